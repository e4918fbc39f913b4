"""From prompts' ids to new ids: many texts at once, each as if it were alone.

A request for text is a `Sequence` (sequence.py). The `Scheduler` (scheduler.py) says which of them stand in the rows of
the model's memory and whether the next forward reads a piece of a prompt or writes one token in every row. The prefix
cache (cache.py) keeps what was read before, and the sampler (sampler.py) chooses among the logits. `Engine` (engine.py)
joins them. docs/engine.md tells the whole.
"""

from nanochat.engine.engine import Engine as Engine
from nanochat.engine.engine import LanguageModel as LanguageModel
from nanochat.engine.sampler import uniform as uniform
from nanochat.engine.scheduler import PREFILL_CHUNK as PREFILL_CHUNK
from nanochat.engine.sequence import Sampling as Sampling
from nanochat.engine.sequence import Sequence as Sequence
from nanochat.engine.sequence import Token as Token
from nanochat.engine.sequence import ToolHook as ToolHook
