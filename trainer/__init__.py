"""Trains what the planner planned. Imports planner, never the reverse."""

import os

# Segments that can grow keep what the allocator reserves close to what is allocated. They grow by pages, and a large
# tensor with nothing beside it leaves the rest of its last page unused: pages of 16 MiB leave less than the 20 of
# torch, and nothing beside sizes that are powers of two. torch reads the setting when it is loaded, so it is made here,
# before any module of this package imports torch; what the user set stands.
ALLOCATOR = "expandable_segments:True,large_segment_size_mb:16"
if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
    os.environ["PYTORCH_ALLOC_CONF"] = ALLOCATOR
