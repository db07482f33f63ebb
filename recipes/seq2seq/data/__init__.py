"""Data sets as examples, and as batches for Lightning."""

from recipes.seq2seq.data.cmudict import load_cmudict
from recipes.seq2seq.data.datamodule import Seq2SeqData
from recipes.seq2seq.data.examples import Example, Splits
from recipes.seq2seq.data.tsv import load_tsv

__all__ = ["Example", "Seq2SeqData", "Splits", "load_cmudict", "load_tsv"]
