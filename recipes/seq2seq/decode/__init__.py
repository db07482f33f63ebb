"""From source ids to hypotheses: greedy decoding, beam search and exact search, for one model or an ensemble."""

from .beam import beam_search as beam_search
from .decoding import DECODINGS as DECODINGS
from .decoding import Decoding as Decoding
from .exact import ExactHypothesis as ExactHypothesis
from .exact import exact_search as exact_search
from .greedy import greedy_decode as greedy_decode
from .prefixes import Hypothesis as Hypothesis
from .prefixes import Models as Models
