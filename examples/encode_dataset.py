"""Encode images once, so that stage 2 trains on their codes.

    accelerate launch --cpu examples/encode_dataset.py --output_dir runs/codes --max_images 200

The program is `src/dq_hf/scripts/encode_dataset.py`, which begins with more launch lines; `--help` explains its options.
"""

from dq_hf.scripts.encode_dataset import main

if __name__ == "__main__":
    main()
