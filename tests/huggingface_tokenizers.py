"""Small tokenizers in the style of current models, built with the library `tokenizers`."""

import json

STYLES = ("llama", "mistral", "gemma", "qwen")
TEXTS = (
    "The cat sat on the mat, and the small red bird saw that one old tree.\n\nIt was in the sun; then it sang.\n",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 23))\n",
    "Köln, naïve, Ångström: 中文沒有空格。 日本語も。 Привет, мир! 🙂\n",
)


def make(style, path, vocab_size=400):
    """Write a tokenizer.json in the style of "llama" (normalizers), "mistral" (Metaspace), "gemma" or "qwen" to `path`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    replace = normalizers.Replace(" ", "▁")
    sentencepiece = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    specials = {"gemma": ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>"], "qwen": ["<|endoftext|>", "<|im_end|>"]}.get(
        style, ["<unk>", "<s>", "</s>", "[INST]"]
    )
    if style == "qwen":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.NFC()
        pattern = (
            r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"""
            r"""|\s+(?!\S)|\s+"""
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        alphabet = []
        strip = [decoders.Strip(" ", 1, 0)]
        if style == "llama":
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
        elif style == "mistral":
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
        else:
            tokenizer.normalizer, strip = replace, []
            tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        tokenizer.decoder = decoders.Sequence([*sentencepiece, *strip])
        specials += [f"<0x{byte:02X}>" for byte in range(256)]
    size = len(specials) + len(alphabet) + vocab_size - 256
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    # Trained on words, as in SentencePiece models, so that no token contains a newline.
    words = [f"{'' if style == 'qwen' else '▁'}{word}" for text in TEXTS for word in text.split()] * 3
    learner = Tokenizer(tokenizer.model)
    learner.pre_tokenizer = tokenizer.pre_tokenizer if style == "qwen" else None
    learner.train_from_iterator(words, trainer)
    document = json.loads(tokenizer.to_str())
    learned = json.loads(learner.to_str())
    document["model"]["vocab"], document["model"]["merges"] = learned["model"]["vocab"], learned["model"]["merges"]
    tokenizer = Tokenizer.from_str(json.dumps(document))
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in specials if not name.startswith("<0x")])
    if style == "gemma":
        tokenizer.add_tokens([AddedToken("\n" * count, normalized=False) for count in (1, 2, 3)])
    if style == "qwen":
        tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    else:
        begin = "<bos>" if style == "gemma" else "<s>"
        template = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))])
        tokenizer.post_processor = template
    tokenizer.save(str(path))
    return path
