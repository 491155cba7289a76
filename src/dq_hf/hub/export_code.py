"""A model's code beside its weights, so that transformers loads it without dq_hf (`trust_remote_code=True`)."""

import json
import sys
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

PACKAGE = Path(__file__).parent.parent
TASK_FILES = ("class_labels.py", "image_generation.py", "seeds.py")
TASKS = {"dq-generation": {"impl": "image_generation.DQGenerationPipeline", "pt": ["AutoModel"], "type": "image"}}


def is_exported(model_class):
    """Whether a class came from exported code, which passes on itself."""
    return model_class.__module__.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}.")


def check_exportable(model_class):
    """Raise ValueError at a class that someone derived from the package's own, whose code alone can be exported."""
    if not is_exported(model_class) and package_of(model_class) != "dq_hf.modeling":
        raise ValueError(
            f"export_code=True writes the code of dq_hf's own classes, and {model_class.__name__} is none of them; leave "
            "export_code out"
        )


def package_of(model_class):
    """Name of the package that a class belongs to."""
    return model_class.__module__.rpartition(".")[0]


def write_code(folder, parts):
    """Write modules into a folder, flat as transformers wants them, and their classes' names into its JSON files.

    Args:
        folder: of a saved model.
        parts: {sub-folder: model} of all models in it, "" for the folder itself; with more than one the task
            "dq-generation" is written, too.
    """
    model_class = type(parts[""])
    main_module, package = sys.modules[model_class.__module__], package_of(model_class)
    folder, source, sources = Path(folder), Path(main_module.__file__).parent, set()

    def name_classes(file, **classes):
        modules = {auto: loaded.__module__.rpartition(".")[2] for auto, loaded in classes.items()}
        for module in modules.values():
            sources.update([f"{source / module}.py", *get_relative_import_files(f"{source / module}.py")])
        update_json(file, auto_map={auto: f"{modules[auto]}.{loaded.__name__}" for auto, loaded in classes.items()})

    own = {name: part for name, part in parts.items() if package_of(type(part)) == package}  # else it is of a library
    for name, part in own.items():
        name_classes(folder / name / "config.json", AutoConfig=type(part.config), AutoModel=type(part))
    if (processor := folder / "preprocessor_config.json").is_file():
        name = json.loads(processor.read_text(encoding="utf-8"))["image_processor_type"]
        name_classes(processor, AutoImageProcessor=getattr(main_module, name))
    tasks = [(source if is_exported(model_class) else PACKAGE / "pipelines") / name for name in TASK_FILES]
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
