"""Train DQ-VAE, the tokenizer (stage 1).

    accelerate launch --cpu examples/train_dqvae.py --output_dir runs/smoke --max_steps 20 --batch_size 8 --save_every 10

The program is `src/dq_hf/scripts/train_dqvae.py`, which begins with more launch lines; `--help` explains its options.
"""

from dq_hf.scripts.train_dqvae import main

if __name__ == "__main__":
    main()
