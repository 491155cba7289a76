r"""Train DQ-Transformer, the generator, on a trained tokenizer's codes (stage 2).

    accelerate launch --cpu examples/train_dqtransformer.py --output_dir runs/smoke2 --max_steps 20 --batch_size 8 \
        --hidden_size 64 --num_position_layers 1 --num_content_layers 1 --max_test_images 50

The program is `src/dq_hf/scripts/train_dqtransformer.py`, which begins with more launch lines; `--help` explains its options.
"""

from dq_hf.scripts.train_dqtransformer import main

if __name__ == "__main__":
    main()
