# The embedded model, from the repository's folder: about four hours of two CPU cores.
# The second stage was first run to step 1,500, with the learning rate falling to 0, and then on to step 5,000. From step
# 4,000 on its held-out loss stayed the same to 0.01 nats; the last weights are taken, whose samples are clearer.
export OMP_WAIT_POLICY=PASSIVE
launch="accelerate launch --cpu --num_cpu_threads_per_process 2 --mixed_precision bf16"
$launch examples/train_dqvae.py --output_dir runs/emoji-vae --max_steps 2000 --save_every 250 --disc_weight 0 \
    --ema_decay 0
$launch examples/encode_dataset.py --vae runs/emoji-vae/model --output_dir runs/emoji-codes
for steps in 1500 5000; do
    $launch examples/train_dqtransformer.py --codes runs/emoji-codes --vae runs/emoji-vae/model \
        --output_dir runs/emoji-transformer --max_steps $steps --save_every 250 --length_buckets False \
        --num_attention_heads 4 --attention_dropout 0 --attn_implementation eager
done
# The decoder alone, further: codes and generator stay as they are. One core, float32.
accelerate launch --cpu --num_cpu_threads_per_process 1 examples/train_dqvae.py --start_from runs/emoji-vae/model --decoder_only \
    --output_dir runs/emoji-decoder --max_steps 1200 --batch_size 8 --learning_rate 3e-4 --ema_decay 0.998 \
    --disc_weight 0 --save_every 200 --sample_every 400 --log_every 10
python examples/build_embedded_model.py --model runs/emoji-transformer/model \
    --checkpoint runs/emoji-transformer/checkpoint-5000 --vae runs/emoji-decoder/model
