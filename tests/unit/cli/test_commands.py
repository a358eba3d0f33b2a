"""What commands print, which platform they take, and how they end."""

import io
import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from lathe.cli import exits, main
from lathe.cli.compare import ResultCache, report, table
from lathe.cli.connection import Connection, Target
from lathe.cli.contexts import Contexts, PlatformContext, write_contexts
from lathe.cli.estimates import answer_lines, confirm, replaced_of
from lathe.cli.jobs import settings_line
from lathe.cli.jobview import JobView, metrics_line, sparkline
from lathe.cli.output import plain, print_facts, print_table, size
from lathe.cli.training_files import dataset_of
from lathe.client.compare import ArmResult
from lathe.common import errors
from lathe.v1 import datasets_pb2, jobs_pb2

RESULTS = [
    ArmResult("base", "m", 60, {"json": 0, "text": 0}, 74, 0, 138, 46.1, 4.92, ("a",)),
    ArmResult("tuned", "ft:m", 60, {"json": 54, "text": 53}, 74, 16, 52, 17.8, 2.21, ("b",), reused=True),
]


@pytest.fixture(autouse=True)
def _no_settings_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the shell that runs the tests is set to is none of their business."""
    for name in [name for name in os.environ if name.startswith("LATHE_")]:
        monkeypatch.delenv(name)


def shown(renderable: object) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(renderable)
    return out.getvalue()


# --- which platform ---


@pytest.fixture
def listening():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def local_platform(folder: Path, address: str) -> Path:
    (folder / "endpoint.json").write_text(json.dumps({"http": "http://x", "grpc": address}))
    (folder / "api_key").write_text("sk-lathe-local\n")
    return folder


def test_a_local_platform_is_found_by_its_folder(tmp_path: Path, listening: str) -> None:
    data = local_platform(tmp_path, listening)
    assert Connection(data=data).target().place == (listening, "sk-lathe-local")
    assert Connection(api_key="sk-other", data=data).target().place == (listening, "sk-other")
    assert Connection("far:1", "sk-far", data).target().place == ("far:1", "sk-far")


def test_the_local_key_is_never_sent_elsewhere(tmp_path: Path, listening: str) -> None:
    with pytest.raises(errors.Unauthenticated, match="--api-key"):
        Connection("far:1", data=local_platform(tmp_path, listening)).target()


def test_a_platform_that_was_killed_is_not_believed(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        gone = f"127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(errors.Unavailable, match="lathe up"):
        Connection(data=local_platform(tmp_path, gone)).target()


def seen_by(monkeypatch: pytest.MonkeyPatch, *arguments: str, contexts: Path) -> Target:
    """The platform that a command would talk to."""
    monkeypatch.setenv("LATHE_CONTEXTS_FILE", str(contexts))
    targets: list[Target] = []
    monkeypatch.setattr(Connection, "client", lambda self: targets.append(self.target()) or _stop())
    result = CliRunner().invoke(main.app, [*arguments, "jobs", "list"])
    if not targets:
        assert result.exception is not None
        raise result.exception
    return targets[0]


@pytest.fixture
def contexts(tmp_path: Path) -> Path:
    """`far` is the current one of two platforms."""
    known = {
        "far": PlatformContext("far:7460", "sk-far", tls=True, ca_file="/ca.pem"),
        "near": PlatformContext("near:7460", "sk-near"),
    }
    write_contexts(tmp_path / "c" / "contexts.yaml", Contexts("far", known))
    return tmp_path / "c" / "contexts.yaml"


def test_the_command_line_wins_over_the_environment_and_that_over_what_is_stored(
    monkeypatch: pytest.MonkeyPatch, contexts: Path
) -> None:
    stored = seen_by(monkeypatch, contexts=contexts)
    assert (stored.address, stored.api_key, stored.tls, stored.ca_file) == (
        "far:7460",
        "sk-far",
        True,
        Path("/ca.pem"),
    )
    monkeypatch.setenv("LATHE_CONTEXT", "near")
    assert seen_by(monkeypatch, contexts=contexts).api_key == "sk-near"
    monkeypatch.setenv("LATHE_ADDRESS", "env:1")
    monkeypatch.setenv("LATHE_API_KEY", "sk-env")
    assert seen_by(monkeypatch, contexts=contexts).place == ("env:1", "sk-env")
    chosen = seen_by(monkeypatch, "--address", "option:1", "--api-key", "sk-option", contexts=contexts)
    assert chosen.place == ("option:1", "sk-option")
    assert seen_by(monkeypatch, "--context", "near", contexts=contexts).place == ("near:7460", "sk-near")


def test_no_key_is_sent_to_a_platform_that_it_is_not_for(
    monkeypatch: pytest.MonkeyPatch, contexts: Path
) -> None:
    monkeypatch.setenv("LATHE_ADDRESS", "env:1")
    monkeypatch.setenv("LATHE_API_KEY", "sk-env")
    with pytest.raises(errors.Unauthenticated, match="not sent elsewhere"):
        seen_by(monkeypatch, "--address", "other:1", contexts=contexts)
    monkeypatch.delenv("LATHE_ADDRESS")
    assert seen_by(monkeypatch, contexts=contexts).api_key == "sk-far"
    assert seen_by(monkeypatch, "--address", "new:1", contexts=contexts).api_key == "sk-env"
    monkeypatch.delenv("LATHE_API_KEY")
    known = seen_by(monkeypatch, "--address", "far:7460", contexts=contexts)
    assert (known.api_key, known.tls) == ("sk-far", True)  # stored with TLS: never sent without


def test_a_local_platform_that_is_named_wins_over_what_is_stored(
    monkeypatch: pytest.MonkeyPatch, contexts: Path, tmp_path: Path, listening: str
) -> None:
    data = local_platform(tmp_path, listening)
    assert seen_by(monkeypatch, "--data", str(data), contexts=contexts).api_key == "sk-lathe-local"
    monkeypatch.setenv("LATHE_DATA", str(data))
    assert seen_by(monkeypatch, contexts=contexts).api_key == "sk-lathe-local"
    assert seen_by(monkeypatch, "--context", "local", contexts=contexts).http == "http://x"


def test_two_platforms_at_once_and_unknown_ones_are_refused(
    monkeypatch: pytest.MonkeyPatch, contexts: Path
) -> None:
    with pytest.raises(errors.InvalidArgument, match="not both"):
        seen_by(monkeypatch, "--address", "a:1", "--context", "near", contexts=contexts)
    with pytest.raises(errors.NotFound, match="far, near"):
        seen_by(monkeypatch, "--context", "farr", contexts=contexts)


def _stop() -> None:
    raise errors.Cancelled("far enough")


# --- exit codes ---


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.NotFound("x"), 3),
        (errors.InvalidArgument("x"), 3),
        (errors.Unavailable("x"), 4),
        (errors.DeadlineExceeded("x"), 4),
        (errors.Unauthenticated("x"), 5),
        (errors.PermissionDenied("x"), 5),
        (errors.FailedPrecondition("x"), 1),
        (errors.Internal("x"), 1),
    ],
)
def test_each_kind_of_error_has_its_exit_code(error: errors.LatheError, code: int) -> None:
    assert exits.exit_code(error) == code


def test_wrong_usage_ends_with_2() -> None:
    assert CliRunner().invoke(main.app, ["jobs", "nonsense"]).exit_code == exits.USAGE
    assert CliRunner().invoke(main.app, ["models", "import"]).exit_code == exits.USAGE


def test_a_setting_that_a_method_has_not_is_wrong_input() -> None:
    create = ["jobs", "create", "--model", "m", "--train", "t", "--set", "beta=0.2"]
    error = CliRunner().invoke(main.app, create).exception
    assert isinstance(error, errors.InvalidArgument) and "supervised has no setting 'beta'" in error.message


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        (["--prompt-tokens-saved", "9"], "given together"),
        (["--price-per-million", "2"], "given together"),
        (["--price-per-million", "2", "--seconds-saved", "1"], "not both"),
    ],
)
def test_what_says_too_little_of_what_is_saved_is_refused(saved: list[str], said: str) -> None:
    error = (
        CliRunner().invoke(main.app, ["jobs", "estimate", "--model", "m", "--train", "t", *saved]).exception
    )
    assert isinstance(error, errors.InvalidArgument) and said in error.message


def test_a_state_that_no_job_has_is_refused_with_those_there_are() -> None:
    error = CliRunner().invoke(main.app, ["jobs", "list", "--state", "done"]).exception
    assert (
        isinstance(error, errors.InvalidArgument) and "choose from validating_files, queued," in error.message
    )


class OnlyJobs:
    """A client whose platform has jobs alone."""

    def __init__(self, jobs: object) -> None:
        self.jobs = jobs

    def __enter__(self) -> "OnlyJobs":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def test_a_watch_that_is_left_says_how_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    class Watched:
        def watch(self, name: str) -> Iterator[jobs_pb2.WatchJobResponse]:
            yield job_update(1, 2.0)
            raise KeyboardInterrupt

    monkeypatch.setattr(Connection, "client", lambda self: OnlyJobs(Watched()))
    for arguments in ([], ["--json"]):
        result = CliRunner().invoke(main.app, ["jobs", "watch", "ftjob-1", *arguments])
        assert result.exit_code == exits.INTERRUPTED
        assert "lathe jobs watch ftjob-1" in result.stderr
    assert json.loads(result.stdout)["job"]["state"] == "running"


# --- what is printed ---


def test_json_has_words_for_states_numbers_for_sizes_and_null_for_what_is_absent() -> None:
    dataset = datasets_pb2.Dataset(
        name="projects/p/datasets/f", state=datasets_pb2.DATASET_STATE_READY, size_bytes=7
    )
    dataset.create_time.FromJsonString("2026-01-02T03:04:05Z")
    value = plain(dataset)
    assert (value["state"], value["size_bytes"], value["report"], value["expire_time"]) == (
        "ready",
        7,
        None,
        None,
    )
    assert value["create_time"] == "2026-01-02T03:04:05Z"
    job = plain(
        jobs_pb2.Job(metadata={"a": "b"}, result_files=["x"], state=jobs_pb2.JOB_STATE_VALIDATING_FILES)
    )
    assert (job["metadata"], job["result_files"], job["seed"]) == ({"a": "b"}, ["x"], None)
    assert job["state"] == "validating_files"


def test_sizes_are_readable() -> None:
    assert [size(7), size(30_284), size(270_000_000)] == ["7 B", "30.3 kB", "270.0 MB"]


def test_a_falling_loss_falls_in_the_sparkline() -> None:
    assert sparkline([]) == ""
    assert sparkline([2.0]) == "▁"
    assert sparkline([3, 2, 1, 0]) == "█▆▃▁"
    assert len(sparkline(list(range(1000)), 40)) == 40


def job_update(step: int, loss: float) -> jobs_pb2.WatchJobResponse:
    metrics = jobs_pb2.StepMetrics(step=step, total_steps=4, train_loss=loss, tokens_per_second=1234, epoch=1)
    event = jobs_pb2.JobEvent(type=jobs_pb2.EVENT_TYPE_METRICS, metrics=metrics)
    job = jobs_pb2.Job(state=jobs_pb2.JOB_STATE_RUNNING, state_reason="Training.")
    return jobs_pb2.WatchJobResponse(job=job, events=[event])


@pytest.mark.parametrize("terminal", [True, False])
def test_a_job_is_shown_on_a_terminal_and_off_it(terminal: bool) -> None:
    out = io.StringIO()
    with JobView(Console(file=out, force_terminal=terminal, width=120)) as view:
        view.update(job_update(1, 2.5))
        view.update(job_update(2, 1.25))
    text = out.getvalue()
    assert ("2.500 → 1.250" in text) is terminal
    assert ("step 2/4, loss 1.250" in text) is not terminal
    assert "1,234 tokens/s" in text


def test_an_estimate_is_shown_with_where_its_numbers_come_from() -> None:
    second, byte = jobs_pb2.EstimateRange, jobs_pb2.EstimateRange
    engine = jobs_pb2.EngineEstimate(
        engine_class="gpu",
        device="cuda",
        tokens_per_second=1234,
        seconds=second(low=120, likely=300, high=7200, basis=jobs_pb2.ESTIMATE_BASIS_MEASURED),
        memory_bytes=byte(low=1e9, likely=2e9, high=4e9, basis=jobs_pb2.ESTIMATE_BASIS_RULE),
        queue_seconds=0,
        price=second(low=0.02, likely=1.5, high=12, basis=jobs_pb2.ESTIMATE_BASIS_MEASURED),
    )
    estimate = jobs_pb2.JobEstimate(
        examples=100,
        n_epochs=1,
        batch_size=8,
        steps=13,
        tokens=5000,
        trained_tokens=700,
        engines=[engine],
        currency="EUR",
    )
    pays = jobs_pb2.BreakEven(requests=1500, net_saved_per_request=0.001)
    found = jobs_pb2.EstimateJobResponse(estimate=estimate, break_even=pays)
    assert list(answer_lines(found)) == [
        "13 steps: 1 epoch of 100 examples, 8 at a time; 5,000 tokens, 700 of them trained.",
        "  gpu (cuda): about 5 min (2 min to 2.0 h, measured), 1,234 tokens/s, memory about 2.0 GB (1.0 GB to 4.0 GB, "
        "by rule), no wait, price about 1.50 EUR (0.02 EUR to 12.00 EUR, measured).",
        "It pays for itself after 1,500 requests, each of which saves 0.001 EUR.",
    ]


def test_what_is_saved_is_read_from_a_comparison() -> None:
    compared = report(
        [RESULTS[1], replace(RESULTS[0], arm="few-shot", prompt_tokens=474.0, seconds=77.8)], "json"
    )
    tokens = replaced_of(compared, "few-shot", 2.0)
    assert (tokens.prompt_tokens_saved, tokens.price_per_million_tokens) == (400, 2)
    assert replaced_of(compared, "few-shot", None).seconds_saved == pytest.approx(1.0)
    with pytest.raises(errors.InvalidArgument, match="no arm 'base'"):
        replaced_of(compared, "base", None)


def test_who_cannot_be_asked_is_not_kept_waiting() -> None:
    asked: list[float] = []

    def ask(timeout: float) -> jobs_pb2.EstimateJobResponse:
        asked.append(timeout)
        raise errors.NotFound("x")

    confirm(ask, yes=False, quiet=True)
    confirm(ask, yes=True, quiet=False)
    assert asked == [0.0, 0.0]


def test_a_preference_step_shows_its_margin() -> None:
    metrics = jobs_pb2.StepMetrics(step=1, total_steps=2, figures={"rewards/margins": 0.25})
    assert "margin 0.250" in metrics_line(metrics)


def test_a_step_in_words_has_the_validation_loss_when_there_is_one() -> None:
    metrics = jobs_pb2.StepMetrics(step=1, total_steps=2, train_loss=1, full_valid_loss=0.5)
    assert "validation loss 0.500" in metrics_line(metrics)


def test_the_table_has_shares_intervals_tokens_seconds_and_what_was_reused() -> None:
    text = shown(table(RESULTS, "json"))
    assert "60 held-out examples" in text
    tuned = next(line for line in text.splitlines() if "tuned" in line)
    for part in ("90.0%", "80% to 95%", "74", "52", "17.8", "2.21", "reused"):
        assert part in tuned
    assert "reused" not in shown(table(RESULTS[:1], "json"))


def test_the_report_has_the_same_for_programs() -> None:
    document = report(RESULTS, "json")
    assert [arm["exact_match"] for arm in document["arms"]] == [0.0, 0.9]
    assert "answers" not in document["arms"][0]
    json.dumps(document)


def test_results_are_reused_only_for_the_same_weights_requests_and_code(tmp_path: Path) -> None:
    cache = ResultCache(tmp_path, "code")
    cache.keep("weights", "requests", RESULTS[0])
    found = cache.find("weights", "requests")
    assert found is not None
    assert found.reused
    assert (found.scores, found.answers) == (RESULTS[0].scores, RESULTS[0].answers)
    assert cache.find("other", "requests") is None
    assert cache.find("weights", "other") is None
    assert ResultCache(tmp_path, "newer").find("weights", "requests") is None
    for file in tmp_path.iterdir():
        file.write_text("{")
    assert cache.find("weights", "requests") is None


# --- what users get wrong ---


def failure(work: Callable[[], object]) -> Exception:
    with pytest.raises(Exception) as raised:
        work()
    return raised.value


def test_what_a_user_got_wrong_is_a_sentence(tmp_path: Path) -> None:
    unwritable = tmp_path / "no" / "such" / "folder"
    told = main.as_lathe_error(failure(lambda: unwritable.write_text("x")))
    assert isinstance(told, errors.FailedPrecondition)
    assert told.message == f"{unwritable} cannot be used: No such file or directory."
    told = main.as_lathe_error(failure(lambda: jobs_pb2.ComputeSpec(workers=10**24)))
    assert isinstance(told, errors.InvalidArgument)
    assert told.message.startswith(f"{10**24} is out of range")


def test_a_fault_of_ours_stays_one() -> None:
    assert main.as_lathe_error(ValueError("x")) is None
    assert main.as_lathe_error(ConnectionResetError()) is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("", "is a folder; name one file"),
        ("trian.jsonl", "There is no file"),
        ("no/such/table", "There is no file"),
    ],
)
def test_a_path_to_no_file_is_not_taken_for_a_dataset(
    tmp_path: Path, listening: str, given: str, words: str
) -> None:
    with (
        Connection(address=listening, api_key="x").client() as client,
        pytest.raises(errors.InvalidArgument, match=words),
    ):
        dataset_of(client, str(tmp_path / given))
    with Connection(address=listening, api_key="x").client() as client:
        assert dataset_of(client, "file-1") == "file-1"
        assert dataset_of(client, "projects/p/datasets/file-1") == "projects/p/datasets/file-1"


def test_what_is_piped_on_has_no_spaces_behind_it(capsys: pytest.CaptureFixture[str]) -> None:
    print_facts((("id", "ftjob-1"), ("state", "failed"), ("empty", "")))
    print_table(("id", "state"), [("ftjob-1", "ok"), ("ftjob-23", "failed")], "none")
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["id     ftjob-1", "state  failed", "id        state", "ftjob-1   ok", "ftjob-23  failed"]


def test_the_settings_of_a_job_that_have_no_line_of_their_own() -> None:
    numbers = jobs_pb2.DpoHyperparameters(n_epochs=2, batch_size=4, beta=0.2, loss_type="ipo")
    training = jobs_pb2.TrainingOptions(schedule="linear", full_parameter=True, keep_checkpoints=3)
    assert settings_line(numbers, training) == "beta 0.2, loss_type ipo, schedule linear, keep_checkpoints 3"
    assert settings_line(jobs_pb2.SupervisedHyperparameters(), jobs_pb2.TrainingOptions()) == ""


# --- what is imported ---


def test_commands_for_a_remote_platform_import_nothing_heavy(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from lathe.cli.main import app\n"
        "result = CliRunner().invoke(app, ['--data', sys.argv[1], 'jobs', 'list'])\n"
        "assert 'Unavailable' in repr(result.exception), result\n"
        "heavy = {'torch', 'transformers', 'sqlalchemy', 'fastapi', 'pydantic_settings', 'lathe.embedded'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]", done.stdout


def test_the_data_folder_keeps_its_secrets_and_refuses_a_second_user(tmp_path: Path) -> None:
    from lathe.datafolder import opened

    with opened(tmp_path / "d") as folder:
        for file in (folder.api_key_file, folder.service_token_file, folder.engine_token_file):
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
        key = folder.api_key_file.read_text()
        with pytest.raises(errors.FailedPrecondition, match="Another"), opened(tmp_path / "d"):
            pass
    with opened(tmp_path / "d") as folder:
        assert folder.api_key_file.read_text() == key
    (tmp_path / "d" / "VERSION").write_text("99\n")
    with pytest.raises(errors.FailedPrecondition, match="newer"), opened(tmp_path / "d"):
        pass
