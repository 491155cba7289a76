"""A model's code beside its weights, so that transformers loads it without dq_hf (`trust_remote_code=True`)."""

import json
import sys
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

PACKAGE = Path(__file__).parent.parent
TASK_FILES = ("class_labels.py", "image_generation.py", "seeds.py")
TASKS = {"dq-generation": {"impl": "image_generation.DQGenerationPipeline", "pt": ["AutoModel"], "type": "image"}}


def is_exported(model_class):
    """Whether a class came from exported code, which passes on itself."""
    return code_folder(model_class).parent != PACKAGE


def code_folder(model_class):
    """Folder of the module that defines a class."""
    return Path(sys.modules[model_class.__module__].__file__).parent


def write_code(folder, parts):
    """Write modules into a folder, flat as transformers wants them, and their classes' names into its JSON files.

    Args:
        folder: of a saved model.
        parts: {sub-folder: model} of all models in it, "" for the folder itself; with more than one the task
            "dq-generation" is written, too.
    """
    folder, source = Path(folder), code_folder(type(parts[""]))
    sources = set()

    def name_classes(file, **classes):
        modules = {auto: loaded.__module__.rpartition(".")[2] for auto, loaded in classes.items()}
        for module in modules.values():
            sources.update([f"{source / module}.py", *get_relative_import_files(f"{source / module}.py")])
        update_json(file, auto_map={auto: f"{modules[auto]}.{loaded.__name__}" for auto, loaded in classes.items()})

    own = {name: part for name, part in parts.items() if code_folder(type(part)) == source}  # else it is of a library
    for name, part in own.items():
        name_classes(folder / name / "config.json", AutoConfig=type(part.config), AutoModel=type(part))
    if (processor := folder / "preprocessor_config.json").is_file():
        name = json.loads(processor.read_text(encoding="utf-8"))["image_processor_type"]
        name_classes(processor, AutoImageProcessor=getattr(sys.modules[type(parts[""]).__module__], name))
    tasks = [(source if is_exported(type(parts[""])) else PACKAGE / "pipelines") / name for name in TASK_FILES]
    if len(own) > 1 and all(map(Path.is_file, tasks)):  # a copy may have come without them
        sources.update(tasks)
        update_json(folder / "config.json", custom_pipelines=TASKS)
    for path in map(Path, sources):
        code = path.read_text(encoding="utf-8").replace("from ..modeling.", "from .")
        (folder / path.name).write_text(code, encoding="utf-8")


def update_json(path, **entries):
    """Add or replace entries of a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8")) | entries
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
