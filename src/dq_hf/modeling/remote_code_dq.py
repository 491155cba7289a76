"""A model's code beside its weights, so that transformers loads it without dq_hf (`trust_remote_code=True`)."""

import json
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

HERE = Path(__file__).parent
IN_PACKAGE = HERE.name == "modeling"  # else this is an exported copy, which passes on itself
TASK_FOLDER = HERE.parent / "pipelines" if IN_PACKAGE else HERE
TASK_FILES = ("class_labels.py", "image_generation.py", "seeds.py")
TASKS = {"dq-generation": {"impl": "image_generation.DQGenerationPipeline", "pt": ["AutoModel"], "type": "image"}}


def auto_classes(model_class):
    """The Auto classes that load a model."""
    return {"AutoConfig": model_class.config_class, "AutoModel": model_class}


def write_code(folder, classes):
    """Write modules into a folder, flat as transformers wants them, and their classes' names into its JSON files.

    Args:
        folder: of a saved model.
        classes: {JSON file in the folder: {Auto class's name: our class}}; with both models, in sub-folders, the task
            "dq-generation" is written, too.
    """
    folder = Path(folder)
    sources = set()
    for name, auto_map in classes.items():
        modules = {auto: loaded.__module__.rpartition(".")[2] for auto, loaded in auto_map.items()}
        for module in modules.values():
            sources |= {f"{HERE / module}.py", *get_relative_import_files(f"{HERE / module}.py")}
        entry = {auto: f"{modules[auto]}.{loaded.__name__}" for auto, loaded in auto_map.items()}
        update_json(folder / name, auto_map=entry)
    task_sources = [TASK_FOLDER / name for name in TASK_FILES]
    both_models = len(classes) > 1
    if both_models and all(map(Path.is_file, task_sources)):  # a copy may have come without them
        sources.update(task_sources)
        update_json(folder / "config.json", custom_pipelines=TASKS)
    for source in map(Path, sources):
        code = source.read_text(encoding="utf-8").replace("from ..modeling.", "from .")
        (folder / source.name).write_text(code, encoding="utf-8")


def without_remote_code(entries):
    """A file's entries as the package reads them: its own classes need no code from there, and no trust."""
    remote = ("auto_map", "custom_pipelines") if IN_PACKAGE else ()
    return {key: value for key, value in entries.items() if key not in remote}


def update_json(path, **entries):
    """Add or replace entries of a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8")) | entries
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
