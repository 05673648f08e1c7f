"""Codes that a tokenizer made of images, stored once: written in shards, read at random."""

from lasad_jax.data.codes.job import Job, store_job
from lasad_jax.data.codes.manifest import Manifest, read_manifest
from lasad_jax.data.codes.reading import CodeExamples
from lasad_jax.data.codes.writing import write_codes

__all__ = ["CodeExamples", "Job", "Manifest", "read_manifest", "store_job", "write_codes"]
