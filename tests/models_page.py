# SPDX-License-Identifier: MIT
"""
docs/models.md: the families, and what each engine's tests have found. A test hands over its engine's answers, and fails where
the page says something else; TQ_WRITE_MODELS=1 writes them into the page instead.
"""
import os
import re
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs/models.md"
FAMILIES = (
    "Llama 3", "Llama 4", "Qwen2.5", "Qwen2.5-VL", "Qwen3", "Qwen3-MoE", "Qwen3-Next", "Qwen3.5", "Qwen3.5-MoE", "Gemma 2",
    "Gemma 3", "Gemma 3n", "Gemma 4", "gpt-oss", "Mistral", "Ministral 3", "Mistral Small 4", "Phi-3", "Phi-4", "SmolLM3",
    "DeepSeek V3", "DeepSeek V3.2", "DeepSeek V4", "GLM 4", "GLM 4-MoE", "GLM 5", "Kimi K2", "Kimi K3", "Kimi-Linear",
    "MiniMax M2", "MiniMax M3", "Nemotron 3", "Granite 4", "Falcon-H1", "LFM2", "Jamba", "ERNIE 4.5", "ERNIE 4.5-MoE",
    "Seed-OSS", "EXAONE 4", "Hunyuan", "Hunyuan-MoE", "OLMo 3", "StarCoder2", "Command R", "Command R7B",
)
ENGINES = ("llama.cpp", "Transformers", "MLX-LM")
ABSENT = "not in this release of the host"
WORDS = ("compressed", "partly", "refused", ABSENT)  # what an answer begins with
_BEGIN, _END = "<!-- begin: written by tests -->", "<!-- end -->"


def _parse(text):
    """{engine: {family: answer}} of the page's long tables."""
    found = {}
    for engine in ENGINES:
        section = re.search(rf"^## {re.escape(engine)}$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
        rows = re.findall(r"^\| (.+?) \| (.+) \|$", section[1], re.MULTILINE) if section else []
        found[engine] = {family: answer for family, answer in rows if family in FAMILIES}
    return found


def _overview(answers):
    """One word for each family and engine."""
    yield f"| | {' | '.join(ENGINES)} |"
    yield "| --- |" + " --- |" * len(ENGINES)
    for family in FAMILIES:
        words = [next((word for word in WORDS if answers[engine].get(family, "?").startswith(word)), "?") for engine in ENGINES]
        yield f"| {family} | {' | '.join('–' if word == ABSENT else word for word in words)} |"


def _tables(answers):
    """What stands between the page's marks."""
    lines = [*_overview(answers)]
    for engine in ENGINES:
        lines += ["", f"## {engine}", "", "| | |", "| --- | --- |"]
        lines += [f"| {family} | {answers[engine].get(family, '?')} |" for family in FAMILIES]
    return "\n".join(lines)


def check(engine, answers):
    """Raises AssertionError if the page does not say this of the engine; answers {family: answer}, maybe of a few families."""
    for family, answer in answers.items():
        assert family in FAMILIES and answer.startswith(WORDS) and "|" not in answer, (family, answer)
    text = PAGE.read_text()
    known = _parse(text)
    before, written, after = re.fullmatch(rf"(.*{_BEGIN}\n)(.*)(\n{_END}\n.*)", text, re.DOTALL).groups()
    wrong = {family: answer for family, answer in answers.items() if known[engine].get(family) != answer}
    known[engine] |= answers
    if os.environ.get("TQ_WRITE_MODELS"):
        PAGE.write_text(before + _tables(known) + after)
        return
    assert not wrong, f"docs/models.md says something else of {engine} than {wrong}: TQ_WRITE_MODELS=1 writes what was found"
    assert written == _tables(known), "docs/models.md was changed by hand between its marks"
