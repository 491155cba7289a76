# The embedded model, from data to assets, from the repository's folder: on one H100 in bfloat16 about 28 minutes if nothing
# else runs there, by an estimate; the times below add up to 34.
# Run on an H100, minutes with the start of each script: the tokenizer's 2,900 steps of 128 images 3.7 (16 a second; 53
# passes), codes in three places 0.4, the generator's first 6,600 steps of 128 streams 5.6 (21 a second, beside another run; 23
# passes), codes in five places 0.7, its next 11,000 steps 11.4 (24 a second alone, 17 beside three other runs; 23 passes), codes in
# six places 1.2, its last 7,000 steps of 512 streams 11.3 (20 a second alone, 6 beside five other runs; 49 passes). The data
# loaders of the first two runs kept their workers from epoch to epoch, which the scripts do not: a little slower.
# The rest was run on CPU cores in float32: calibrating; the decoder, on codes of before that, in 40 minutes; and the router.
# So were 850 steps of 16 of the generator between its first two parts, with unmoved codes and a learning rate of 2e-4, which
# are left out here. The last part began with the bfloat16 weights of the model embedded before.
# The sampling defaults come from `python benchmarks/text_alignment.py --prompts 64 --sweep`.
set -e
launch="accelerate launch --num_processes 1 --mixed_precision bf16"
$launch examples/train_dqvae.py --output_dir runs/gpu-vae --codebook_size 1024 --fine_ratios 0.44 --disc_weight 0 \
    --perceptual_weight 0.1 --no_flip_column letters --batch_size 128 --learning_rate 2e-3 --warmup_steps 300 \
    --ema_decay 0 --max_steps 2900 --sample_every 725 --num_workers 8
# The generator, on images in several places. Without dropout and other places 6,800 steps of 128 learned the training codes by
# heart (0.2 nats a content, held-out pairs 10.4) and drew fragments.
$launch examples/encode_dataset.py --vae runs/gpu-vae/model --output_dir runs/gpu-codes-moved --copies 3 --max_shift 2 \
    --test_split test_pairs test --label_column none --caption_column captions --no_flip_column letters \
    --batch_size 128 --num_workers 6
$launch examples/train_dqtransformer.py --codes runs/gpu-codes-moved --vae runs/gpu-vae/model --output_dir runs/gpu-moved \
    --test_split test_pairs test --label_column none --caption_column captions --text_length 12 --dropout 0.1 \
    --attention_dropout 0 --batch_size 128 --learning_rate 1e-3 --warmup_steps 300 --max_steps 6600 --sample_every 2200 \
    --num_workers 3
# Held-out pictures are plainer than the training's: 0.466 of the latter's regions are 150 codes of the former, on which the
# number was chosen. The regions that become fine have thin lines: 0.3 dB for 5 codes.
dq-hf calibrate --data examples/data/emoji --model runs/gpu-vae/model --fine-ratio 0.466
$launch examples/encode_dataset.py --vae runs/gpu-vae/model --output_dir runs/gpu-codes --copies 5 --max_shift 2 \
    --test_split test_pairs test --label_column none --caption_column captions --no_flip_column letters \
    --batch_size 128 --num_workers 6
$launch examples/train_dqtransformer.py --codes runs/gpu-codes --vae runs/gpu-vae/model --output_dir runs/gpu-text \
    --test_split test_pairs test --label_column none --caption_column captions --text_length 12 --dropout 0.1 \
    --start_from runs/gpu-moved/model --text_encoder runs/gpu-moved/model --train_text_encoder \
    --attention_dropout 0 --batch_size 128 --learning_rate 1e-3 --warmup_steps 300 --max_steps 11000 --sample_every 2750 \
    --num_workers 4
$launch examples/train_dqvae.py --start_from runs/gpu-vae/model --decoder_only --output_dir runs/gpu-decoder \
    --disc_weight 0 --perceptual_weight 0.02 --no_flip_column letters --batch_size 16 --learning_rate 5e-4 \
    --warmup_steps 20 --ema_decay 0 --max_steps 1200 --sample_every 1200
# Another router: 0.4 dB more at as many codes. Encoder, codebook and decoder stay as they are, and so does what the generator has
# learned of the codes; which regions are fine changes. 0.464 was chosen like 0.466.
dq-hf train-router --data examples/data/emoji --model runs/gpu-decoder/model --output runs/gpu-gain --fine-ratio 0.464 \
    --batch-size 16 --steps 150
$launch examples/encode_dataset.py --vae runs/gpu-gain --output_dir runs/gpu-codes-gain --copies 6 --max_shift 2 \
    --test_split test_pairs test --label_column none --caption_column captions --no_flip_column letters \
    --batch_size 128 --num_workers 8
$launch examples/train_dqtransformer.py --codes runs/gpu-codes-gain --vae runs/gpu-gain --output_dir runs/gpu-gain-text \
    --test_split test_pairs test --label_column none --caption_column captions --text_length 12 --dropout 0.1 \
    --start_from runs/gpu-text/model --text_encoder runs/gpu-text/model --train_text_encoder \
    --attention_dropout 0 --batch_size 512 --learning_rate 1.5e-3 --warmup_steps 300 --max_steps 7000 --sample_every 2333 \
    --num_workers 5
python examples/build_embedded_model.py --model runs/gpu-gain-text/model --vae runs/gpu-gain \
    --guidance_scale 2 --temperature 0.7 --top_p 0.9
