# An earlier embedded text model (commit 758ee9f; the present one: emoji_gpu.sh), on one CPU core in float32, from the
# repository's folder: an hour and a half for the tokenizer's 5,000 steps, 1.6 hours for the generator's 4,063. The data are
# in the repository; from their packages (needs npm and resvg-py) by `python examples/build_emoji_dataset.py --force`.
set -e
export OMP_WAIT_POLICY=PASSIVE
launch="accelerate launch --cpu --num_cpu_threads_per_process 1 --mixed_precision no"
mkdir -p runs
# Both go on from the class model that was embedded first, which is in the repository's history.
before=runs/dq-emoji
git archive 39b1c1f src/dq_hf/assets/dq-emoji | tar -x -C runs --strip-components 3
python examples/split_codebook.py --vae $before --output_dir runs/emoji-vae-start
dq-hf calibrate --data examples/data/emoji --model runs/emoji-vae-start --fine-ratio 0.44
$launch examples/train_dqvae.py --start_from runs/emoji-vae-start --output_dir runs/emoji-vae --disc_weight 0 \
    --perceptual_weight 0.1 --batch_size 8 --learning_rate 2.5e-4 --ema_decay 0.998 --max_steps 5000
# The generator, first on images in three places, then on unmoved ones, where a content costs it 0.2 nats less. What was run
# differs in that the first part was 763 steps of a schedule of 3,600, whose last weights went on, not averaged ones, and in
# that its text prefix had begun with 500 steps of another run. Shipped are the averaged weights of the last step: the
# held-out loss was lowest at step 2,000, but what the text is worth still grew.
vae=runs/emoji-vae/model
$launch examples/encode_dataset.py --vae $vae --output_dir runs/emoji-codes-moved --copies 3 --max_shift 4 \
    --test_split test test_pairs --label_column none --caption_column captions --no_flip_column letters
$launch examples/encode_dataset.py --vae $vae --output_dir runs/emoji-codes \
    --test_split test test_pairs --label_column none --caption_column captions --no_flip_column letters
python examples/adopt_codes.py --model $before --vae $vae --data examples/data/emoji --text_length 12 \
    --output_dir runs/emoji-text-start
$launch examples/train_dqtransformer.py --codes runs/emoji-codes-moved --vae $vae --start_from runs/emoji-text-start \
    --text_encoder small --output_dir runs/emoji-text-moved --test_split test_pairs test --label_column none \
    --caption_column captions --text_length 12 --dropout 0 --attention_dropout 0 --ema_decay 0.999 --batch_size 16 --learning_rate 1e-3 \
    --warmup_steps 50 --max_steps 763 --sample_every 763 --max_test_images 150
$launch examples/train_dqtransformer.py --codes runs/emoji-codes --vae $vae --start_from runs/emoji-text-moved/model \
    --text_encoder runs/emoji-text-moved/model --train_text_encoder --output_dir runs/emoji-text \
    --test_split test_pairs test --label_column none --caption_column captions --text_length 12 --dropout 0 \
    --attention_dropout 0 --ema_decay 0.999 --batch_size 16 --learning_rate 1e-3 --warmup_steps 20 --max_steps 3300 \
    --save_every 250 --max_test_images 150
python examples/build_embedded_model.py --output_dir runs/dq-emoji-cpu --model runs/emoji-text/model --checkpoint runs/emoji-text/checkpoint-3300 \
    --temperature 0.8 --top_p 0.9 --guidance_scale 3.5
