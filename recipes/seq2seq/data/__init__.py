"""Data sets as examples, and as batches for Lightning."""

from .cmudict import load_cmudict
from .datamodule import Seq2SeqData
from .examples import Example, Splits
from .parallel import load_parallel
from .synthetic import make_sequences
from .tsv import load_tsv

__all__ = ["Example", "Seq2SeqData", "Splits", "load_cmudict", "load_parallel", "load_tsv", "make_sequences"]
