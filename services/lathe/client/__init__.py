"""The public client of Lathe: synchronous, typed, and light (gRPC and the contracts are all it needs).

    from lathe.client import Client

    with Client("localhost:7460", api_key="sk-lathe-…") as client:
        data = client.datasets.upload("train.jsonl")
        job = client.jobs.create(model="smollm2-135m-instruct", training_dataset=data.name)
        for update in client.jobs.watch(job.name):
            ...
        print(client.chat(job.fine_tuned_model, [{"role": "user", "content": "Hello"}]).choices[0].message.content)

Every call raises the classes of `lathe.common.errors`; results are the messages of `lathe.v1`.
"""

from lathe.client.client import Client
from lathe.client.transport import Tls

__all__ = ["Client", "Tls"]
