"""The web demo, `dq-hf demo`: `page` is what visitors see (gradio), `views` computes it, `checks` reads what they send."""
