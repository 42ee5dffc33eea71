"""Models' tokenizers with their chat templates, as transformers would load them."""

import json
from dataclasses import dataclass

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from app.llm.engine.echo import EchoBackend
from app.llm.models.description import special_tokens
from app.llm.protocol import EngineInfo
from app.llm.tokenizer import PromptTokenizer
from tests.data import chat_templates as templates
from tests.support import zoo_tokenizers as kinds


@dataclass(frozen=True)
class Pair:
    """A tokenizer and a chat template.

    Attributes:
        tokens: Special tokens; the first begins a text and the second ends an answer.
        lead: What the model writes before an answer's first word.
        takes_system: Whether the template writes a system message.
        stable: Whether transformers itself encodes an answer in a later prompt as it was generated.
    """

    build: kinds.Build
    tokens: tuple[str, ...]
    template: str
    lead: str = ""
    takes_system: bool = True
    stable: bool = True

    def reference(self) -> PreTrainedTokenizerFast:
        """The tokenizer of transformers."""
        begin, end = self.tokens[:2]
        return PreTrainedTokenizerFast(
            tokenizer_object=self.build(self.tokens),
            bos_token=begin,
            eos_token=end,
            chat_template=self.template,
        )

    def served(self) -> PromptTokenizer:
        """The service's tokenizer of the same model."""
        reference = self.reference()
        fields = {name: getattr(EchoBackend().info, name) for name in EngineInfo.__struct_fields__}
        model = {
            "tokenizer_json": reference.backend_tokenizer.to_str(),
            "chat_template": self.template,
            "special_tokens": special_tokens(reference),
        }
        return PromptTokenizer(EngineInfo(**{**fields, **model}))


_S = ("<s>", "</s>")
_IM = ("<|im_start|>", "<|im_end|>")
_HEADER = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
_INST = ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]")
_MISTRAL = ("[ARGS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
_TURN = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
_PHI = ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
_DEEPSEEK = ("<\uff5cbegin▁of▁sentence\uff5c>", "<\uff5cend▁of▁sentence\uff5c>")
_COMMAND = ("USER", "CHATBOT", "SYSTEM", "START_OF_TURN", "END_OF_TURN")
_ROLE = ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>")
_GLM = ("<|user|>", "<|assistant|>", "<|system|>", "<sop>", "[gMASK]", "<eop>")
_EXAONE = ("[|user|]", "[|assistant|]", "[|system|]")

ZOO = {
    "chatml": Pair(kinds.gpt2, _IM, templates.CHATML),
    "smollm": Pair(kinds.gpt2, (*_IM, "<|endoftext|>"), templates.CHATML),
    "yi": Pair(kinds.llama2_new, (*_S, *_IM), templates.CHATML),
    "prefixed": Pair(kinds.prefixed, _IM, templates.CHATML),
    "hermes": Pair(kinds.llama3, ("<|begin_of_text|>", *_IM), templates.HERMES),
    "qwen": Pair(kinds.qwen, ("<|endoftext|>", *_IM), templates.HERMES),
    "qwen thinking": Pair(kinds.qwen, ("<|endoftext|>", *_IM), templates.QWEN_THINKING),
    "llama3": Pair(kinds.llama3, (*_HEADER, "<|python_tag|>"), templates.LLAMA3),
    "llama2": Pair(kinds.llama2, _S, templates.LLAMA2, lead=" "),
    "llama2 normalized": Pair(kinds.llama2_normalized, _S, templates.LLAMA2, lead=" "),
    "llama2 not legacy": Pair(kinds.llama2_new, _S, templates.LLAMA2, lead=" "),
    "mistral": Pair(kinds.llama2_new, (*_S, *_INST), templates.MISTRAL, lead=" "),
    "mistral legacy": Pair(kinds.llama2, (*_S, *_INST), templates.MISTRAL, stable=False),
    "mistral args": Pair(kinds.llama3, (*_S, *_INST, *_MISTRAL), templates.MISTRAL_ARGS),
    "gemma": Pair(kinds.gemma, _TURN, templates.GEMMA, takes_system=False),
    "gemma3": Pair(kinds.gemma, _TURN, templates.GEMMA3),
    "phi3": Pair(kinds.phi3, (*_S, *_PHI), templates.PHI3),
    "phi3 early": Pair(kinds.phi3, (*_S, *_PHI), templates.PHI3_EARLY, takes_system=False),
    "phi3 stripping": Pair(kinds.stripping, (*_S, *_PHI), templates.PHI3),
    "phi4": Pair(kinds.gpt2, ("<|endoftext|>", *_IM, "<|im_sep|>"), templates.PHI4),
    "zephyr": Pair(kinds.mistral, _S, templates.ZEPHYR),
    "vicuna": Pair(kinds.llama2, _S, templates.VICUNA, lead=" "),
    "vicuna normalized": Pair(kinds.llama2_normalized, _S, templates.VICUNA, lead=" "),
    "tinyllama": Pair(kinds.llama2, _S, templates.ZEPHYR),
    "alpaca": Pair(kinds.llama2, _S, templates.ALPACA),
    "deepseek": Pair(
        kinds.deepseek, (*_DEEPSEEK, templates.USER, templates.ASSISTANT), templates.DEEPSEEK
    ),
    "deepseek chat": Pair(
        kinds.deepseek, _DEEPSEEK, templates.DEEPSEEK_CHAT, lead=" ", stable=False
    ),
    "command-r": Pair(
        kinds.gpt2,
        ("<BOS_TOKEN>", "<EOS_TOKEN>", *(f"<|{name}_TOKEN|>" for name in _COMMAND)),
        templates.COMMAND_R,
    ),
    "granite": Pair(kinds.gpt2, ("<|endoftext|>", *_ROLE), templates.GRANITE),
    "openchat": Pair(kinds.mistral, (*_S, "<|end_of_turn|>"), templates.OPENCHAT, lead=" "),
    "starling": Pair(kinds.llama2, (*_S, "<|end_of_turn|>"), templates.OPENCHAT, lead=" "),
    "solar": Pair(kinds.llama2, _S, templates.SOLAR),
    "falcon": Pair(kinds.falcon, ("<|bos|>", "<|endoftext|>"), templates.FALCON, lead=" "),
    "olmo": Pair(kinds.gpt2, ("<|endoftext|>", "<|eos|>"), templates.OLMO),
    "glm": Pair(kinds.llama3, ("<|endoftext|>", "<|stop|>", *_GLM), templates.GLM),
    "exaone": Pair(kinds.gpt2, ("[BOS]", "[|endofturn|]", *_EXAONE), templates.EXAONE),
    "unigram": Pair(kinds.unigram, (*_S, *_IM), templates.CHATML),
    "unigram llama2": Pair(kinds.unigram, _S, templates.LLAMA2, lead=" "),
}


def disguise(text: str, tokens: tuple[str, ...]) -> str:
    """The text with its special tokens spelled in another way."""
    for token in tokens:
        text = text.replace(token, f"{token[0]}¦{token[1:]}")
    # Templates make some tokens of a role's name.
    for token in {"<|user|>", "[|user|]"} & set(tokens):
        text = text.replace(f"'{token[:2]}'", f"'{token[0]}¦|'")
    return text


def disguised(pair: Pair) -> PreTrainedTokenizerFast:
    """The same model with other spellings of its special tokens, for which its own are text."""
    reference = pair.reference()
    tokens = tuple(framing(reference))
    model = json.loads(reference.backend_tokenizer.to_str())
    for token in model["added_tokens"]:
        token["content"] = disguise(token["content"], tokens)
    vocabulary = model["model"]["vocab"]
    if isinstance(vocabulary, dict):
        model["model"]["vocab"] = {disguise(t, tokens): i for t, i in vocabulary.items()}
        if model["model"].get("unk_token"):
            model["model"]["unk_token"] = disguise(model["model"]["unk_token"], tokens)
    else:
        model["model"]["vocab"] = [[disguise(t, tokens), score] for t, score in vocabulary]
    model["post_processor"] = None
    named = special_tokens(reference)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(model)),
        chat_template=disguise(pair.template, tokens),
        **{name: disguise(token, tokens) for name, token in named.items()},
    )


def framing(reference: PreTrainedTokenizerFast) -> list[str]:
    """The tokens that a caller must not be able to write."""
    added = reference.added_tokens_decoder.values()
    template = reference.chat_template
    return [
        t.content
        for t in added
        if t.special or (t.content in template and any(map(str.isalnum, t.content)))
    ]
