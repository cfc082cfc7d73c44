"""The policy's weights from the trainer's GPU to all servers' GPUs in one broadcast, through vLLM's weight transfer.

For servers that all have --weight-transfer-config '{"backend": "nccl"}', and vLLM installed here. Written from vLLM
0.32's source and NOT RUN: there were no GPUs. Known limit: a server that dies within a broadcast leaves NCCL, and with
it the run, waiting; so does an error of the first rank in the midst of it under --shard fsdp. --resume starts anew.
"""

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import torch
from torch import nn

from posttrain.common.cli import first_line
from posttrain.common.engines.client import Servers
from posttrain.common.machines import distributed
from posttrain.common.machines.weights import full_weights


class Broadcast:
    """send(tag) is False where the servers or this installation have no NCCL: then weights go by disk.

    It is also the client that vLLM's trainer side drives (VLLMWeightSyncClient).
    """

    def __init__(self, model: nn.Module, servers: Servers):
        self.model, self.servers, self.dtype = model, servers, getattr(model, "autocast_dtype", None)
        self.shapes: list = []
        self.transfer, self.urls, self.tag, self.usable = None, [], "", True

    def send(self, tag: str) -> bool:
        """Every rank must call it: gathering weights is collective. The first is the one that sends."""
        if not self.usable:
            return False
        if not self.shapes:
            self.shapes = [(name, self.dtype or x.dtype, tuple(x.shape)) for name, x in full_weights(self.model)]
        connected = distributed.rank() > 0 or self.connect()
        connected, self.usable = distributed.from_first((connected, self.usable))
        if not connected:
            return False
        if distributed.rank():
            for _ in full_weights(self.model):
                pass
        else:
            try:
                self.transfer.send_weights()
                self.post("update_weight_version", {"new_version": tag})
                self.tag = tag
            except Exception as error:  # a server is gone, and its place in the group with it
                print(f"NCCL transfer failed ({first_line(error)}); weights go by disk from now on", flush=True)
                self.usable = False
        self.usable = distributed.from_first(self.usable)
        return self.usable

    def connect(self) -> bool:
        """A process group of this rank and the workers of all servers that answer, unless it is there. -> whether it is

        A server that was started again has lost its place: it does not hold the weights sent last.
        """
        versions = {server.url: self.version(server.url) for server in self.servers.servers}
        urls = [url for url, version in versions.items() if version]
        if self.transfer and urls == self.urls and {versions[url] for url in urls} == {self.tag}:
            return True
        if not urls:
            return False  # none answers now
        try:
            from vllm.distributed.weight_transfer import nccl_engine as vllm_nccl

            for url in urls:  # asked without what it needs, which a server without NCCL says first
                answer = self.request("POST", url, "init_weight_transfer_engine", {"init_info": {}})
                if "not configured" in answer.text or answer.status_code in (403, 404):
                    self.usable = False
                    return False
            self.urls = urls
            self.post("shutdown_weight_transfer_engine", {})  # an earlier group
            sizes = [int(self.request("GET", url, "get_world_size").json()["world_size"]) for url in urls]
            self.offsets = [1 + sum(sizes[:i]) for i in range(len(sizes))]
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # this machine's address as servers see it
                probe.connect((httpx.URL(urls[0]).host, 80))
                address = probe.getsockname()[0]
            with socket.socket() as probe:
                probe.bind(("", 0))
                port = probe.getsockname()[1]
            info = vllm_nccl.NCCLTrainerInitInfo(address, port, 1 + sum(sizes), rank=0)
            source = source_of(self.model, self.shapes, self.dtype)
            engine = vllm_nccl.NCCLTrainerWeightTransferEngine
            self.transfer = engine.trainer_init(info, client=self, source=source)
        except Exception as error:  # of many types: no vLLM here, no server, no route
            print(f"no NCCL between trainer and servers ({first_line(error)}); weights go by disk", flush=True)
            self.usable = False
            return False
        return True

    def version(self, url: str) -> str:
        try:
            return self.request("GET", url, "weight_info").json()["weight_version"]
        except (httpx.HTTPError, ValueError, KeyError):
            return ""

    def request(self, kind: str, url: str, path: str, body: dict | None = None) -> httpx.Response:
        settings = {"timeout": self.servers.seconds if body else 20, "trust_env": False}
        return httpx.request(kind, f"{url}/{path}", json=body, headers=self.servers.headers, **settings)

    def post(self, path: str, *bodies: dict) -> None:
        """To all servers at once, for each waits within the call for the others. One body for all or one for each."""

        def send(url: str, body: dict) -> None:
            self.request("POST", url, path, body).raise_for_status()

        with ThreadPoolExecutor(len(self.urls)) as pool:
            list(pool.map(send, self.urls, bodies if len(bodies) > 1 else bodies * len(self.urls)))

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        infos = [{"init_info": init_info | {"rank_offset": offset}} for offset in self.offsets]
        self.post("init_weight_transfer_engine", *infos)

    def start_weight_update(self) -> None:
        self.post("start_weight_update", {})

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.post("update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.post("finish_weight_update", {"weight_version": weight_version})


def source_of(model: nn.Module, shapes: list, dtype: torch.dtype | None) -> Any:
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class Source(WeightSource):
        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(*each) for each in shapes]

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            for name, weight in full_weights(model):
                yield name, weight.to("cuda", dtype or weight.dtype)

    return Source()
