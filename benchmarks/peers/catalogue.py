"""All engines and peers by name."""

from __future__ import annotations

from benchmarks.peers.engine import Engine, Peer
from benchmarks.peers.llama_cpp import LlamaCpp
from benchmarks.peers.openvino import OpenVINO
from benchmarks.peers.vllm import VLLM


def engines() -> dict[str, Engine]:
    every: list[Engine] = [LlamaCpp(), OpenVINO(), VLLM()]
    return {engine.name: engine for engine in every}


def peers() -> dict[str, Peer]:
    """Installed or not."""
    return {peer.name: peer for engine in engines().values() for peer in engine.peers()}


def installed() -> set[str]:
    """Names of the peers that can be started."""
    return {peer.name for engine in engines().values() if engine.installed() for peer in engine.peers()}
