"""The tokenizer: byte-level BPE behind Qwen's pre-tokeniser splitting, ChatML and think tags as special tokens."""

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .corpus import Corpus, Doc
from .curriculum import PHASES, draw

PAD, START, END, THINK, UNTHINK = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"
SPECIALS = [PAD, START, END, THINK, UNTHINK]
VOCABULARY = 2048
# Words, single digits, punctuation and line breaks apart; a leading space belongs to the word that follows.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHOICES = ("Yes", " Yes", "No", " No", "true", " true", "false", " false", "1", "2")

CHAT_TEMPLATE = """{#- ChatML with the semantics of Qwen3's template.

enable_thinking undefined or true: the generation prompt ends after the assistant header, and the model writes
its own think block. enable_thinking false: the generation prompt goes on with an empty think block, so the
model answers at once.

An assistant turn after the last user turn is shown with a think block, empty if it has no reasoning; earlier
assistant turns are shown without one. So for a list that ends with the assistant's answer, the prompt made from
the list without that answer (add_generation_prompt=True, enable_thinking=False) is an exact string prefix of
the whole: do not add the empty block to the answer, it is already there.
-#}
{%- set ns = namespace(last_user=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set ns.last_user = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'assistant' %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last_user %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""


def train_tokenizer(documents: int = 40_000) -> PreTrainedTokenizerFast:
    """A tokenizer trained on the corpus of seed 0, always the same: every model seed shares it."""
    corpus = Corpus(seed=0)
    # Segment by segment, as the model will meet them: this is how bare `true` and `Yes` become tokens too.
    texts = (part.text for number in range(documents) for part in draw(corpus, PHASES[number % len(PHASES)]))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, model_max_length=1024, padding_side="left"
    )
    fast.chat_template = CHAT_TEMPLATE
    check(fast)
    return fast


def check(tokenizer: PreTrainedTokenizerFast) -> None:
    """What the scoring relies on: choices are single tokens, and the prompt is a prefix of prompt and answer."""
    for word in CHOICES:
        if len(tokenizer.encode(word, add_special_tokens=False)) != 1:
            raise ValueError(f"{word!r} is not a single token")
    asked = [{"role": "system", "content": "Be honest."}, {"role": "user", "content": "Hello?"}]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    whole = tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": "Hi."}], tokenize=False)
    if not whole.startswith(prompt) or whole != prompt + "Hi.<|im_end|>\n":
        raise ValueError("the chat template does not extend its own generation prompt")


def encode(tokenizer: PreTrainedTokenizerFast, docs: list[Doc]) -> list[tuple[list[int], list[float]]]:
    """Token ids and loss weights of each document; every segment is tokenised by itself."""
    parts = [part for doc in docs for part in doc]
    encoded = iter(
        tokenizer.backend_tokenizer.encode_batch_fast([part.text for part in parts], add_special_tokens=False)
    )
    rows = []
    for doc in docs:
        ids: list[int] = []
        weights: list[float] = []
        for part in doc:
            piece = next(encoded).ids
            share = [part.weight] * len(piece)
            if part.skip_first:
                share[0] = 0.0
            ids += piece
            weights += share
        rows.append((ids, weights))
    return rows
