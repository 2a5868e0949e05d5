"""Whom Pagewire is measured beside: how each is installed, converted a model for, and started at its best.

    python -m benchmarks.peers                     # what there is, and what is installed
    python -m benchmarks.peers install openvino    # an engine from package registries, our model in its format
    python -m benchmarks.peers run llama-q8_0 --port 8080

Everything lies under `$PAGEWIRE_HOME/peers/ENGINE`, each engine in an environment of its own.
"""
