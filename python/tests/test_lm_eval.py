# SPDX-License-Identifier: MIT
"""lm-eval's HFLM with install(): the real model scores what it scores with its own cache, on two small tasks of our own."""
import json

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from smollm import load, novel
from libturboquant.transformers import TurboQuantCache, install, uninstall

CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo", "Russia": "Moscow",
            "Egypt": "Cairo", "Greece": "Athens", "Portugal": "Lisbon", "Austria": "Vienna", "Cuba": "Havana", "Peru": "Lima"}
SHOTS = "Norway: Oslo\nSweden: Stockholm\nIreland: Dublin\n"


@pytest.fixture(scope="module")
def loaded():
    return load()


@pytest.fixture(scope="module")
def tasks(loaded, tmp_path_factory):
    """Capitals behind 400 tokens of a novel, so that most of what is read is coded: written, and chosen of two."""
    folder = tmp_path_factory.mktemp("tasks")
    text = loaded[1].decode(novel(loaded[1], 400))
    names = list(CAPITALS.values())
    with open(folder / "capitals.jsonl", "w") as file:
        for i, (country, city) in enumerate(CAPITALS.items()):
            row = {"prompt": f"{text}\n\n{SHOTS}{country}:", "city": city, "choices": [city, names[(i + 5) % len(names)]]}
            file.write(json.dumps(row) + "\n")
    common = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "capitals.jsonl"}}}}}
test_split: test
doc_to_text: "{{{{prompt}}}}"
"""
    (folder / "written.yaml").write_text(f"""task: capitals_written{common}
output_type: generate_until
doc_to_target: "{{{{city}}}}"
generation_kwargs: {{until: ["\\n"], do_sample: false, max_gen_toks: 8}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}}]
filter_list: [{{name: stripped, filter: [{{function: remove_whitespace}}, {{function: take_first}}]}}]
""")
    (folder / "chosen.yaml").write_text(f"""task: capitals_chosen{common}
output_type: multiple_choice
doc_to_target: 0
doc_to_choice: choices
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""")
    return TaskManager(include_path=str(folder), include_defaults=False)


def scores(loaded, tasks):
    model, tokenizer = loaded
    found = lm_eval.simple_evaluate(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4), task_manager=tasks,
                                    tasks=["capitals_written", "capitals_chosen"], bootstrap_iters=0)
    return {name: {metric: value for metric, value in of.items() if isinstance(value, float)}
            for name, of in found["results"].items()}


def test_scores(loaded, tasks, monkeypatch):
    model = loaded[0]
    wanted = scores(loaded, tasks)
    assert wanted["capitals_written"]["exact_match,stripped"] > .6 and wanted["capitals_chosen"]["acc,none"] > .6
    made = []
    create = TurboQuantCache.__init__

    def counted(cache, *args, **more):
        made.append(cache)
        create(cache, *args, **more)

    monkeypatch.setattr(TurboQuantCache, "__init__", counted)
    with torch.no_grad():
        install(model, preset="TQ6")
        assert scores(loaded, tasks) == wanted
        assert made, "no compressed cache was made: this test shows nothing"
        n_made = len(made)
        uninstall(model)
        assert scores(loaded, tasks) == wanted
    assert len(made) == n_made
