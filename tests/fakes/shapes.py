"""The shape of a model whose memory can be worked out by hand."""

from __future__ import annotations

from cluster.spec.shape import ModelShape

SHAPE = ModelShape(num_parameters=1000, num_layers=2, hidden_size=8, vocab_size=50, num_kv_heads=2, head_dim=4)
