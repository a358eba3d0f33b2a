import pytest

from lathe.datasets.addresses import may_reach, networks
from lathe.datasets.fetching import FetchRefused, checked, shown

INSIDE = (
    *("127.0.0.1", "127.8.8.8", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254"),
    *(
        "100.64.0.1",
        "100.100.100.200",
        "192.0.0.192",
        "168.63.129.16",
        "198.18.0.1",
        "224.0.0.1",
        "240.0.0.1",
    ),
    *("255.255.255.255", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1"),
    *("2001:db8::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::7f00:1"),
    *("2002:7f00:1::", "2002:a9fe:a9fe::", "::127.0.0.1", "nonsense"),
    # Site-local; a local NAT64 prefix whose IPv4 address lies elsewhere than at the end; what nobody was given.
    *("fec0::1", "64:ff9b:1:7f00:0:100::", "64:ff9b:1:7f00:0:100:808:808", "4000::1", "::ffff:0:7f00:1"),
)
OUTSIDE = ("8.8.8.8", "93.184.216.34", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808")


@pytest.mark.parametrize("address", INSIDE)
def test_the_inside_is_out_of_reach(address):
    assert not may_reach(address, ())


@pytest.mark.parametrize("address", OUTSIDE)
def test_the_outside_is_within_reach(address):
    assert may_reach(address, ())


def test_what_the_operator_allows():
    allowed = networks(["10.1.0.0/16", "fd00::/8"])
    assert (
        may_reach("10.1.2.3", allowed)
        and may_reach("::ffff:10.1.2.3", allowed)
        and may_reach("fd00::1", allowed)
    )
    assert not may_reach("10.2.0.1", allowed) and not may_reach("169.254.169.254", allowed)
    with pytest.raises(ValueError):
        networks(["10.0.0.1/8"])


@pytest.mark.parametrize(
    "url",
    [
        *(
            "",
            "file:///etc/passwd",
            "ftp://x/y",
            "//x/y",
            "http://",
            "https://user:secret@x/y",
            "http://x:0/",
        ),
        *(
            "http://x:99999/",
            "http://x/a b",
            "http://x/\n",
            "http://x/ä",
            "http://[::1",
            "http://x/" + "a" * 5000,
        ),
    ],
)
def test_what_is_no_url_to_import_from(url):
    with pytest.raises(FetchRefused):
        checked(url)


def test_a_signature_is_not_shown():
    assert shown("https://x.example/a.jsonl?sig=secret#part") == "https://x.example/a.jsonl"
