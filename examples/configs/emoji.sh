# The embedded model, from the repository's folder: about 100 minutes on two CPU cores.
export OMP_WAIT_POLICY=PASSIVE
accelerate launch --cpu --num_cpu_threads_per_process 2 --mixed_precision bf16 examples/train_dqvae.py \
    --output_dir runs/emoji-vae --max_steps 2000 --save_every 250
accelerate launch --cpu --num_cpu_threads_per_process 2 --mixed_precision bf16 examples/train_dqtransformer.py \
    --vae runs/emoji-vae/model --output_dir runs/emoji-transformer --max_steps 1500 --save_every 250 \
    --num_attention_heads 4 --attention_dropout 0 --attn_implementation eager
python examples/build_embedded_model.py --model runs/emoji-transformer/model
