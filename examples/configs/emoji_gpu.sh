# The embedded model on one H100 in bfloat16, from data to assets, from the repository's folder: 21 minutes by an estimate.
# It has not been run on a GPU. The estimate, at 20 TFLOP/s, a 50th of what the GPU can do:
#   tokenizer   6.2 GFLOP an image and step: 4,500 steps of 128 images, 82 passes       0.1 s a step    8 minutes
#   codes       8 copies and their mirror images, 98,000 rows, as CPUs decode them                     2 minutes
#   generator   6 x 6.4 M parameters x 210 elements, 8 GFLOP: 8,000 steps of 128        0.06 s a step   8 minutes
#   assets      figures and samples on a CPU                                                            3 minutes
# Networks this small wait for kernels to start as much as for arithmetic: time the first hundred steps of each stage, and
# give other --max_steps if they take longer. Sizes are those of the CPU recipe, which fill the 20 MB of the assets.
set -e
launch="accelerate launch --num_processes 1 --mixed_precision bf16"
$launch examples/train_dqvae.py --output_dir runs/gpu-vae --codebook_size 1024 --fine_ratios 0.44 --disc_weight 0 \
    --perceptual_weight 0.1 --no_flip_column letters --batch_size 128 --learning_rate 1e-3 --warmup_steps 200 \
    --max_steps 4500 --save_every 1500 --sample_every 1500 --num_workers 12
$launch examples/encode_dataset.py --vae runs/gpu-vae/model --output_dir runs/gpu-codes --test_split test test_pairs \
    --label_column none --caption_column captions --no_flip_column letters --copies 8 --max_shift 4 --batch_size 256 \
    --num_workers 12
$launch examples/train_dqtransformer.py --codes runs/gpu-codes --vae runs/gpu-vae/model --output_dir runs/gpu-text \
    --test_split test_pairs test --label_column none --caption_column captions --text_length 12 --attention_dropout 0 \
    --ema_decay 0.999 --batch_size 128 --learning_rate 1e-3 --warmup_steps 200 --max_steps 8000 --save_every 2000 \
    --sample_every 1000 --num_workers 4
python examples/build_embedded_model.py --model runs/gpu-text/model --commands examples/configs/emoji_gpu.sh
