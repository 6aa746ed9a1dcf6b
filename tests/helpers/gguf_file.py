"""A tiny model as a GGUF file."""

import gguf


def write_gguf(path, model):
    """Write a model as a float32 GGUF file in the layout of llama.cpp, with a tokenizer of two letters."""
    config = model.config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    out = gguf.GGUFWriter(path, "llama")
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(heads)
    out.add_head_count_kv(groups)
    out.add_key_length(config.head_dim)
    out.add_value_length(config.head_dim)
    out.add_rope_freq_base(config.rope_parameters["rope_theta"])
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_vocab_size(config.vocab_size)
    out.add_tokenizer_model("gpt2")
    out.add_token_list(["a", "b", "ab", "abb", *(f"t{i}" for i in range(4, config.vocab_size))])
    out.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    out.add_token_merges(["a b", "ab b"])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            n = heads if "q_proj" in name else groups
            # llama.cpp rotates neighbours, transformers rotates halves
            weight = weight.view(n, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)
        out.add_tensor(names.get_name(name, try_suffixes=(".weight",)) or name, weight.float().numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
