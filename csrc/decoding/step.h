// One step of decoding with a Llama-shaped model: all layers in one call, so that threads start once.
#pragma once

#include <cstdint>
#include <vector>

namespace repo {

// Packed weights (packed_weight.h) and vectors of one layer; biases, q_norm and k_norm may be null. qkv: outputs of
// queries, keys and values.
struct LayerWeights {
    const float *input_norm, *qkv, *qkv_bias, *q_norm, *k_norm, *out, *out_bias, *post_norm, *gate, *up, *down;
};

// Every width but the vocabulary is a multiple of 16. half: all weights are packed in bfloat16. norm: (hidden,). head:
// packed.
struct DecoderModel {
    bool half;
    int64_t hidden, heads, key_heads, columns, inner, vocabulary;
    float epsilon, scale;
    std::vector<LayerWeights> layers;
    const float *norm, *head;
};

// The new token of `rows` sequences. x: (rows, hidden), its embeddings, overwritten. cos, sin: (rows, columns).
// slots: (rows,), the place of each sequence in the cache. lengths: (rows,), its tokens there, the new one not counted.
// keys: (layers, places, key heads, columns, capacity). values: (layers, places, key heads, capacity, columns).
// logits: (rows, vocabulary).
struct DecodeStep {
    int64_t rows, places, capacity;
    const int32_t *slots, *lengths;
    const float *cos, *sin;
    float *x, *keys, *values, *logits;
};

// Appends the keys and values of the tokens to the cache and writes the logits of the next tokens. The result of a row
// depends neither on the other rows nor on the number of threads.
void decode_step(const DecoderModel& model, const DecodeStep& step, int threads);

}  // namespace repo
