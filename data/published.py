"""The published sets that data/download_data.py fetches, and where they lie."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """Where a set lies on the hub; how its records are converted is found by their fields."""

    hub_id: str
    split: str
    config: str | None = None
    file: str | None = None  # the records' file within the repository; None: as the `datasets` library loads it


@dataclass(frozen=True)
class Published:
    """A published set: what it is for, and its sources by name, the default one first."""

    use: str
    sources: dict[str, Source]


def published(name: str, split: str, use: str, publisher: Source | None = None) -> Published:
    """A set that Gen-Verse has, and whose publisher may have it too.

    Its repositories hold one file each, as in the downloads of https://github.com/Gen-Verse/dLLM-RL (data/).
    """
    sources = {"gen-verse": Source(f"Gen-Verse/{name}", split, file=f"{split}/{name}.json")}
    return Published(use, sources | ({"publisher": publisher} if publisher else {}))


SETS: dict[str, Published] = {
    "MATH500": published("MATH500", "test", "evaluation", Source("HuggingFaceH4/MATH-500", "test")),
    "GSM8K": published("GSM8K", "test", "evaluation", Source("openai/gsm8k", "test", "main")),
    "AIME2024": published("AIME2024", "test", "evaluation", Source("HuggingFaceH4/aime_2024", "train")),
    "LiveCodeBench": published("LiveCodeBench", "test", "evaluation, code"),
    "LiveBench": published("LiveBench", "test", "evaluation, code"),
    "MBPP": published("MBPP", "test", "evaluation, code", Source("google-research-datasets/mbpp", "test", "full")),
    "HumanEval": published("HumanEval", "test", "evaluation, code", Source("openai/openai_humaneval", "test")),
    # https://huggingface.co/datasets/TIGER-Lab/MMLU-Pro and https://huggingface.co/datasets/Idavidrein/gpqa: the
    # second asks to be agreed to on its page first; it has 448 questions in gpqa_main, 198 of them in gpqa_diamond.
    "MMLU-Pro": Published("evaluation, options", {"publisher": Source("TIGER-Lab/MMLU-Pro", "test")}),
    "GPQA": Published("evaluation, options", {"publisher": Source("Idavidrein/gpqa", "train", "gpqa_main")}),
    "GPQA_diamond": Published("evaluation, options", {"publisher": Source("Idavidrein/gpqa", "train", "gpqa_diamond")}),
    "MATH_train": published("MATH_train", "train", "training"),
    "PrimeIntellect": published("PrimeIntellect", "train", "training, code"),
    "demon_openr1math": published("demon_openr1math", "train", "training"),
    "GSM8K_train": Published("training, examples", {"publisher": Source("openai/gsm8k", "train", "main")}),
    "Countdown": Published("training, countdown", {"publisher": Source("Jiayi-Pan/Countdown-Tasks-3to4", "train")}),
}
