"""A Ray cluster of this machine alone, on loopback, obeying one line of JSON at a time (see ray_cluster.py).

    {"deploy": {"model": "demo", ...}}     deploy, wait until all replicas run      -> {}
    {"status": true}                       what every engine replica says of itself -> [{"replica": ...}, ...]

Ends with its standard input.
"""

from __future__ import annotations

import json
import sys

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from gqa_serve.deploy.ray_app import ENGINE, app

_STORE_BYTES = 100 * 2**20


def main(port: int, num_cpus: int, temp_dir: str) -> None:
    ray.init(
        num_cpus=num_cpus,
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=_STORE_BYTES,
        _temp_dir=temp_dir,
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    engines: DeploymentHandle | None = None  # one for all: each follows the replicas by itself
    try:
        for line in sys.stdin:
            command = json.loads(line)
            if "deploy" in command:
                serve.run(app(command["deploy"]))
                answer: object = {}
            else:
                engines = engines or serve.get_deployment_handle(ENGINE, "default")
                said = engines.broadcast("status").results(timeout_s=60, return_exceptions=True)
                answer = [
                    each for each in said if not isinstance(each, BaseException)
                ]  # the dead say nothing
            print("answer", json.dumps(answer), flush=True)
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
