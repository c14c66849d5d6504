// A whole step of a dense transformer on the CPU: token ids in, KV in the pool, logits out. compiled.py calls it.
//
// Reads like models/transformer.py, which is its reference: embed; in each layer norm, q k v, rope and cache write, attend, out, norm, gate
// and up, down; final norm and logits of the rows that are asked for. Activations are fp32, weights are widened where they are
// read. Threads share each phase's tasks and meet at its end (team.h). Built for AVX-512 alone; other processors use torch.

#include "attend_few.h"
#include "attend_many.h"
#include "draw.h"
#include "matmul.h"
#include "team.h"

#include <memory>

namespace {

// Twins of compiled.py's structures of the same names.
struct Layer {
    const float* input_norm;
    Matrix qkv;
    const float *q_norm, *k_norm;  // of each head, or null
    Matrix out;
    const float* post_norm;
    Matrix gate_up;  // panels of gate and up in turn; the bias is gate's, then up's
    Matrix down;
    int64_t window;  // tokens that a token sees at most
};

struct Model {
    int64_t num_layers, hidden, num_heads, intermediate;
    float eps, attention_factor;
    const Layer* layers;
    const float* inverse_frequencies;  // [head_dim / 2]
    const float* final_norm;
    Matrix head;              // [vocab, hidden]
    const uint8_t* embed;     // rows of head's format, or null: head's panels hold them
    const float* embed_scales;
    int64_t rounds;           // products and attention take bf16, by the processor's units; all matrices are of the DOTS then, and only then
};

struct Step {  // batch.py's StepBatch, and where the results go
    int64_t num_tokens, num_spans, num_rows;
    const int64_t *token_ids, *positions;  // [num_tokens]
    const int64_t *begins, *contexts, *lanes;  // [num_spans (+ 1)]: rows, tokens with those of this step, and the row of `tables`
    const int32_t* tables;
    int64_t table_stride;
    const int64_t* rows;  // [num_rows], those whose logits are wanted
    float* logits;        // [num_rows, vocab]
    int64_t* best;        // [num_rows], token with the largest logit, the first of equals; -1: a logit is not finite
};

struct Span {  // rows [begin, end) belong to one sequence
    int64_t begin, end, context;
    const int32_t* table;

    Span(const Step& step, int64_t i)
        : begin(step.begins[i]), end(step.begins[i + 1]), context(step.contexts[i]), table(step.tables + step.lanes[i] * step.table_stride) {}
};

struct Buffer {
    std::unique_ptr<float[]> memory;
    int64_t capacity = 0, stride = 0;

    void fit(int64_t rows, int64_t width) {
        stride = width + ROW_PADDING;
        if (rows * stride > capacity) {
            capacity = rows * stride;
            memory.reset(new float[size_t(capacity)]);
        }
    }
    float* row(int64_t i) const { return memory.get() + i * stride; }
};

// ---- Small ops, a row at a time

// Sixteen floats of a row, or as many in bf16.
INLINE void put_some(float* row, int64_t first, Floats x, bool rounds) {
    if (rounds) store_narrow(reinterpret_cast<uint16_t*>(row) + first, x);
    else store(row + first, x);
}

void rms_norm(const float* x, const float* weight, int64_t width, float eps, float* out, bool rounds) {
    Floats squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += LANES) squares = fma(load(x + i), load(x + i), squares);
    const Floats factor = splat(1.0f / std::sqrt(sum(squares) / float(width) + eps));
    for (int64_t i = 0; i < width; i += LANES) put_some(out, i, _mm512_mul_ps(_mm512_mul_ps(load(x + i), factor), load(weight + i)), rounds);
}

INLINE Floats silu(Floats x) { return _mm512_div_ps(x, _mm512_add_ps(splat(1.0f), exponential(_mm512_sub_ps(_mm512_setzero_ps(), x)))); }

void rotate(float* x, const float* cos, const float* sin, int64_t half) {
    for (int64_t i = 0; i < half; ++i) {
        const float low = x[i], high = x[half + i];
        x[i] = low * cos[i] - high * sin[i];
        x[half + i] = high * cos[i] + low * sin[i];
    }
}

float widen_weight(const uint8_t* at, int64_t index, Weight format) {
    if (is_bf16(format)) return widen_bf16(reinterpret_cast<const uint16_t*>(at)[index]);
    if (format == Weight::FP32) return reinterpret_cast<const float*>(at)[index];
    return float(reinterpret_cast<const int8_t*>(at)[index]);
}

void embed(const Model& model, int64_t token, float* out) {
    const Matrix& head = model.head;
    if (model.embed) {
        const float scale = model.embed_scales ? model.embed_scales[token] : 1.0f;
        const uint8_t* row = model.embed + token * model.hidden * element_bytes(head.format);
        for (int64_t k = 0; k < model.hidden; ++k) out[k] = widen_weight(row, k, head.format) * scale;
        return;
    }
    const float scale = head.scales ? head.scales[token] : 1.0f;
    const int64_t column = token % PANEL;
    const uint8_t* panel = head.panel(token / PANEL);
    for (int64_t k = 0; k < model.hidden; ++k) {
        const int64_t paired = k / 2 * 2 * PANEL + column / LANES * 2 * LANES + column % LANES * 2 + k % 2;
        out[k] = widen_weight(panel, is_bf16(head.format) ? paired : k * PANEL + column, head.format) * scale;
    }
}

// The first of the largest, or -1 where one is not finite.
int64_t best_of(const float* logits, int64_t count) {
    Floats top = splat(-INFINITY), wrong = _mm512_setzero_ps();
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        const Floats x = load(logits + i);
        top = _mm512_max_ps(top, x);
        wrong = fma(x, _mm512_setzero_ps(), wrong);  // NaN of NaN and of infinity
    }
    float most = largest(top), bad = sum(wrong);
    for (; i < count; ++i) most = std::max(most, logits[i]), bad += logits[i] * 0.0f;
    if (!(bad == 0.0f)) return -1;
    for (i = 0; i + LANES <= count; i += LANES) {
        const __mmask16 found = _mm512_cmp_ps_mask(load(logits + i), splat(most), _CMP_EQ_OQ);
        if (found) return i + __builtin_ctz(found);
    }
    for (; i < count; ++i) if (logits[i] == most) return i;
    return -1;
}

// ---- The step

constexpr int64_t ROWS_ALONE = 4;  // so few rows every thread norms for itself: cheaper than to meet
constexpr int64_t TASKS_PER_THREAD = 3;  // attention is cut finer until there are so many
constexpr int64_t MANY_ROWS = 33;        // from so many on they fill enough lanes
constexpr int64_t LEAST_PARTS = 4;       // of the context in one piece of it

class StepEngine {
public:
    explicit StepEngine(int64_t num_threads) : team_(num_threads), members_(size_t(num_threads)) {
        for (auto& member : members_) member.reset(new Member);
    }

    void run(const Model& model, const Pool& pool, const Step& step) {
        model_ = &model, pool_ = &pool, step_ = &step;
        prepare();
        team_.run([this](int64_t member) { compute(*members_[size_t(member)]); });
    }

    // For tests: x [rows, inputs], floats or bf16 as the matrix wants them, times it, to [rows, columns].
    void multiply_alone(const Matrix& matrix, const float* x, int64_t rows, float* out) {
        team_.run([&](int64_t) {
            times(matrix, rows, x, matrix.inputs / 2 * words_of_pair(matrix.format), [&](int64_t row, int64_t column, Floats left, Floats right) {
                put(out + row * matrix.columns, column, matrix.columns, left, right);
            });
        });
    }

private:
    struct Member {
        Buffer normed;
        Scratch scratch;
    };
    struct Task {  // of attention: rows of tokens [begin, end) of a span, one head, a piece of their parts
        int64_t span, begin, end, head, first_part, end_part;
        int64_t partial;  // where its parts go one by one, or -1: it has them all
    };
    struct Merge {  // the tokens whose parts lie apart
        int64_t span, begin, end, head, end_part, partial;
    };

    int64_t group() const { return model_->num_heads / pool_->kv_heads; }
    int64_t partial_floats() const { return pool_->head_dim + 2; }

    void prepare() {
        const Model& m = *model_;
        const int64_t dim = pool_->head_dim, rows = step_->num_tokens, qkv = (m.num_heads + 2 * pool_->kv_heads) * dim;
        hidden_.fit(rows, m.hidden), normed_.fit(std::max(rows, step_->num_rows), m.hidden), qkv_.fit(rows, qkv);
        mixed_.fit(rows, m.num_heads * dim), inner_.fit(rows, m.intermediate), angles_.fit(rows, dim);
        if (m.rounds) rounded_mixed_.fit(rows, m.num_heads * dim / 2), rounded_inner_.fit(rows, m.intermediate / 2);
        const Kv format = Kv(pool_->format);
        attends_rounded_ = m.rounds && (format == Kv::BF16 || format == Kv::INT8 || format == Kv::E4M3);
        for (auto& member : members_) member->normed.fit(ROWS_ALONE, m.hidden);
        plan_attention();
    }

    void plan_attention() {
        tasks_.clear(), merges_.clear();
        const int64_t tokens_per_tile = std::max<int64_t>(1, MAX_ROWS / group());
        int64_t work = 0;  // in parts of rows, for the size of a piece
        for (int64_t s = 0; s < step_->num_spans; ++s) {
            const Span span(*step_, s);
            const int64_t tiles = (span.end - span.begin + tokens_per_tile - 1) / tokens_per_tile;
            work += tiles * ((span.context + PART - 1) / PART) * pool_->kv_heads;
        }
        const int64_t most = std::max(LEAST_PARTS, team_.size() == 1 ? work : work / (team_.size() * TASKS_PER_THREAD) + 1);
        int64_t partials = 0;
        for (int64_t s = 0; s < step_->num_spans; ++s) {
            const Span span(*step_, s);
            for (int64_t begin = span.begin; begin < span.end; begin += tokens_per_tile) {
                const int64_t end = std::min(span.end, begin + tokens_per_tile);
                const int64_t parts = (span.context - (span.end - end) + PART - 1) / PART;
                for (int64_t head = 0; head < pool_->kv_heads; ++head) {
                    const int64_t pieces = (parts + most - 1) / most, at = partials;
                    if (pieces == 1) {
                        tasks_.push_back({s, begin, end, head, 0, parts, -1});
                        continue;
                    }
                    for (int64_t i = 0; i < pieces; ++i) {
                        const int64_t first = parts * i / pieces, last = parts * (i + 1) / pieces;
                        tasks_.push_back({s, begin, end, head, first, last, at + first * (end - begin) * group()});
                    }
                    merges_.push_back({s, begin, end, head, parts, at});
                    partials += parts * (end - begin) * group();
                }
            }
        }
        partials_.fit(partials, partial_floats() - ROW_PADDING);
    }

    void compute(Member& me) {
        const Model& m = *model_;
        const int64_t tokens = step_->num_tokens, dim = pool_->head_dim;
        team_.share(tokens, [&](int64_t token, int64_t) {
            embed(m, step_->token_ids[token], hidden_.row(token));
            const float position = float(step_->positions[token]);
            for (int64_t i = 0; i < dim / 2; ++i) {
                const float angle = position * m.inverse_frequencies[i];
                angles_.row(token)[i] = std::cos(angle) * m.attention_factor;
                angles_.row(token)[dim / 2 + i] = std::sin(angle) * m.attention_factor;
            }
        });
        for (int64_t index = 0; index < m.num_layers; ++index) {
            const Layer& layer = m.layers[index];
            const float* x = norm(me, layer.input_norm, tokens, [&](int64_t row) { return hidden_.row(row); });
            times(layer.qkv, tokens, x, normed_.stride, [&](int64_t row, int64_t column, Floats left, Floats right) {
                put(qkv_.row(row), column, layer.qkv.columns, left, right);
            });
            team_.share(tokens * pool_->kv_heads, [&](int64_t i, int64_t) { write(layer, index, i / pool_->kv_heads, i % pool_->kv_heads); });
            team_.share(int64_t(tasks_.size()), [&](int64_t i, int64_t next) {
                attend(layer, index, tasks_[size_t(i)], next == i ? nullptr : &tasks_[size_t(next)], me.scratch);
            });
            if (!merges_.empty()) team_.share(int64_t(merges_.size()), [&](int64_t i, int64_t) { merge_pieces(merges_[size_t(i)]); });
            add_times(layer.out, tokens, m.rounds ? rounded_mixed_ : mixed_);
            x = norm(me, layer.post_norm, tokens, [&](int64_t row) { return hidden_.row(row); });
            gate(layer.gate_up, tokens, x, normed_.stride);
            add_times(layer.down, tokens, m.rounds ? rounded_inner_ : inner_);
        }
        if (step_->num_rows == 0) return;
        const float* x = norm(me, m.final_norm, step_->num_rows, [&](int64_t row) { return hidden_.row(step_->rows[row]); });
        times(m.head, step_->num_rows, x, normed_.stride, [&](int64_t row, int64_t column, Floats left, Floats right) {
            put(step_->logits + row * m.head.columns, column, m.head.columns, left, right);
        });
        team_.share(step_->num_rows, [&](int64_t row, int64_t) {
            step_->best[row] = best_of(step_->logits + row * m.head.columns, m.head.columns);
        });
    }

    // -- matrix products

    template <class From> const float* norm(Member& me, const float* weight, int64_t rows, From from) {
        const Model& m = *model_;
        if (rows <= ROWS_ALONE) {
            for (int64_t row = 0; row < rows; ++row) rms_norm(from(row), weight, m.hidden, m.eps, me.normed.row(row), m.rounds);
            return me.normed.row(0);
        }
        team_.share(rows, [&](int64_t row, int64_t) { rms_norm(from(row), weight, m.hidden, m.eps, normed_.row(row), m.rounds); });
        return normed_.row(0);
    }

    // How many tasks a product is cut into: of as many `pieces` (panels, or pairs of them) as are taken at once, and as many for each thread.
    int64_t num_tasks(int64_t pieces, int64_t at_once) const {
        const int64_t each = std::max<int64_t>(1, at_once) * team_.size();
        return std::min(pieces, (pieces + each - 1) / each * team_.size());
    }

    // emit(row, first column, 32 columns of the product), with the bias.
    template <class Emit> void times(const Matrix& matrix, int64_t rows, const float* x, int64_t stride, Emit emit) {
        const int64_t panels = matrix.num_panels(), blocks = (rows + ROW_BLOCK - 1) / ROW_BLOCK, tasks = num_tasks(panels, panels_together(rows));
        team_.share(tasks * blocks, [&](int64_t i, int64_t next) {
            const int64_t first = rows * (i / tasks) / blocks, end = rows * (i / tasks + 1) / blocks, task = i % tasks;
            const uint8_t* after = matrix.panel(panels * (next % tasks) / tasks);
            multiply(matrix, panels * task / tasks, panels * (task + 1) / tasks, after, end - first, x + first * stride, stride,
                     [&](int64_t panel, int64_t row, Floats left, Floats right) {
                const int64_t column = panel * PANEL;
                Floats biases[2];
                bias(matrix.bias, column, matrix.columns, biases);
                emit(first + row, column, _mm512_add_ps(left, biases[0]), _mm512_add_ps(right, biases[1]));
            });
        });
    }

    static void bias(const float* values, int64_t first, int64_t columns, Floats* out) {
        for (int64_t half = 0; half < 2; ++half) out[half] = values ? load_some(values, first + half * LANES, columns) : _mm512_setzero_ps();
    }

    static void put(float* row, int64_t column, int64_t columns, Floats left, Floats right) {
        if (column + PANEL <= columns) {
            store(row + column, left), store(row + column + LANES, right);
        } else {
            _mm512_mask_storeu_ps(row + column, lanes_of(column, columns), left);
            _mm512_mask_storeu_ps(row + column + LANES, lanes_of(column + LANES, columns), right);
        }
    }

    // hidden += x times matrix; columns are a multiple of 16.
    void add_times(const Matrix& matrix, int64_t rows, const Buffer& x) {
        times(matrix, rows, x.row(0), x.stride, [&](int64_t row, int64_t column, Floats left, Floats right) {
            float* to = hidden_.row(row) + column;
            store(to, _mm512_add_ps(load(to), left));
            if (column + LANES < matrix.columns) store(to + LANES, _mm512_add_ps(load(to + LANES), right));
        });
    }

    // inner = silu(x times gate) * (x times up)
    void gate(const Matrix& matrix, int64_t rows, const float* x, int64_t stride) {
        const int64_t width = model_->intermediate, pairs = matrix.num_panels() / 2, blocks = (rows + ROW_BLOCK - 1) / ROW_BLOCK;
        const int64_t tasks = num_tasks(pairs, panels_together(rows) / 2);
        team_.share(tasks * blocks, [&](int64_t i, int64_t next) {
            const int64_t first = rows * (i / tasks) / blocks, end = rows * (i / tasks + 1) / blocks, task = i % tasks;
            const uint8_t* after = matrix.panel(pairs * (next % tasks) / tasks * 2);
            multiply(matrix, pairs * task / tasks * 2, pairs * (task + 1) / tasks * 2, after, end - first, x + first * stride, stride,
                     [&](int64_t panel, int64_t row, Floats left, Floats right) {
                const bool is_up = panel % 2;
                const int64_t column = panel / 2 * PANEL;
                float* to = inner_.row(first + row) + column;
                Floats biases[2];
                bias(matrix.bias ? matrix.bias + is_up * width : nullptr, column, width, biases);
                left = _mm512_add_ps(left, biases[0]), right = _mm512_add_ps(right, biases[1]);
                float* product = is_up && model_->rounds ? rounded_inner_.row(first + row) : inner_.row(first + row);
                put_some(product, column, is_up ? _mm512_mul_ps(load(to), left) : silu(left), is_up && model_->rounds);
                if (column + LANES >= width) return;
                put_some(product, column + LANES, is_up ? _mm512_mul_ps(load(to + LANES), right) : silu(right), is_up && model_->rounds);
            });
        });
    }

    // -- attention

    // Norms and rotates the queries and the key of one token and head, writes key and value.
    void write(const Layer& layer, int64_t index, int64_t token, int64_t head) {
        const Model& m = *model_;
        const int64_t dim = pool_->head_dim, run = dim & -dim;
        const float *cos = angles_.row(token), *sin = cos + dim / 2;
        float* row = qkv_.row(token);
        const auto turn = [&](float* x, const float* weight) {
            if (weight) rms_norm(x, weight, dim, m.eps, x, false);
            rotate(x, cos, sin, dim / 2);
            if (pool_->is_quantised()) hadamard(x, dim, run);
        };
        const Floats scale = splat(1.0f / std::sqrt(float(dim)));  // of the scores
        for (int64_t i = head * group(); i < (head + 1) * group(); ++i) {
            float* query = row + i * dim;
            turn(query, layer.q_norm);
            for (int64_t d = 0; d < dim; d += LANES) put_some(query, d, _mm512_mul_ps(load(query + d), scale), attends_rounded_);
        }
        float* key = row + (m.num_heads + head) * dim;
        turn(key, layer.k_norm);
        const int64_t position = step_->positions[token], at = position % pool_->block_size;
        const int64_t block = span_of(token).table[position / pool_->block_size];
        const auto keep = [&](int64_t side, const float* x) {
            uint16_t* scales = pool_->is_quantised() ? pool_->scales(block, index, side, head, at) : nullptr;
            FORMATS[pool_->format].store(x, 1, dim, pool_->elements(block, index, side, head, at), scales);
        };
        keep(0, key);
        keep(1, row + (m.num_heads + pool_->kv_heads + head) * dim);
    }

    Span span_of(int64_t token) const {
        const int64_t* after = std::upper_bound(step_->begins, step_->begins + step_->num_spans + 1, token);
        return Span(*step_, after - step_->begins - 1);
    }

    Context context(int64_t index, const Task& task) const {
        const Span span(*step_, task.span);
        return {pool_, span.table, index, task.head, span.context};
    }

    // The parts from the first that a row of the task sees.
    int64_t first_part(const Layer& layer, const Task& task) const {
        const Span span(*step_, task.span);
        const int64_t low = span.context - (span.end - task.begin) - layer.window + 1;
        return std::max(task.first_part, low / PART);
    }

    // `next` is the thread's next task, or null.
    void attend(const Layer& layer, int64_t index, const Task& task, const Task* next, Scratch& scratch) {
        const Span span(*step_, task.span);
        Attention attention{};
        attention.context = context(index, task);
        attention.group = group(), attention.window = layer.window;
        attention.first_position = span.context - (span.end - task.begin);
        attention.rows = (task.end - task.begin) * group();
        attention.first_part = task.first_part, attention.end_part = task.end_part;
        if (next) attention.after = context(index, *next), attention.after_part = first_part(layer, *next);
        for (int64_t row = 0; row < attention.rows; ++row) {
            const int64_t token = task.begin + row / group(), head = task.head * group() + row % group();
            attention.queries[row] = qkv_.row(token) + head * pool_->head_dim;
            attention.results[row] = mixed_.row(token) + head * pool_->head_dim;
        }
        const int64_t first = std::min(task.end_part, first_part(layer, task));
        if (task.partial >= 0) {
            attention.partials = partials_.row(task.partial), attention.partial_stride = partials_.stride;
            for (int64_t part = task.first_part; part < first; ++part) {
                for (int64_t row = 0; row < attention.rows; ++row) *attention.partial(part, row) = -INFINITY;
            }
            attention.partials = attention.partial(first, 0);
        }
        attention.first_part = first;
        if (first == task.end_part) return;
        switch (Kv(pool_->format)) {
            case Kv::BF16: attend_as<Kv::BF16>(attention, scratch); break;
            case Kv::FP16: attend_as<Kv::FP16>(attention, scratch); break;
            case Kv::FP32: attend_as<Kv::FP32>(attention, scratch); break;
            case Kv::INT8: attend_as<Kv::INT8>(attention, scratch); break;
            case Kv::E4M3: attend_as<Kv::E4M3>(attention, scratch); break;
        }
        if (task.partial >= 0) return;
        for (int64_t row = 0; row < attention.rows; ++row) round_mixed(task.begin + row / group(), task.head * group() + row % group());
    }

    template <Kv FORMAT> void attend_as(const Attention& attention, Scratch& scratch) const {
        if constexpr (HAS_BF16_UNITS && (FORMAT == Kv::BF16 || FORMAT == Kv::INT8 || FORMAT == Kv::E4M3)) {
            if (attends_rounded_) return attend_rows<FORMAT, true>(attention, scratch);
        }
        attend_rows<FORMAT, false>(attention, scratch);
    }

    template <Kv FORMAT, bool DOTS> static void attend_rows(const Attention& attention, Scratch& scratch) {
        if (attention.rows < MANY_ROWS) attend_few<FORMAT, DOTS>(attention, scratch);
        else attend_many<FORMAT, DOTS>(attention, scratch);
    }

    // What one head of one token attended to, for the product that comes next.
    void round_mixed(int64_t token, int64_t head) {
        if (!model_->rounds) return;
        const int64_t dim = pool_->head_dim;
        for (int64_t d = head * dim; d < (head + 1) * dim; d += LANES) put_some(rounded_mixed_.row(token), d, load(mixed_.row(token) + d), true);
    }

    void merge_pieces(const Merge& merge) {
        const int64_t rows = (merge.end - merge.begin) * group(), dim = pool_->head_dim;
        for (int64_t row = 0; row < rows; ++row) {
            float* result = mixed_.row(merge.begin + row / group()) + (merge.head * group() + row % group()) * dim;
            Merged state;
            for (int64_t part = 0; part < merge.end_part; ++part) {
                const float* from = partials_.row(merge.partial + part * rows + row);
                take(result, state, from[0], from[1], from + 2, dim);
            }
            divide_by(result, state.weight, dim);
            round_mixed(merge.begin + row / group(), merge.head * group() + row % group());
        }
    }

    Team team_;
    std::vector<std::unique_ptr<Member>> members_;
    const Model* model_ = nullptr;
    const Pool* pool_ = nullptr;
    const Step* step_ = nullptr;
    Buffer hidden_, normed_, qkv_, mixed_, inner_, angles_, partials_;
    Buffer rounded_mixed_, rounded_inner_;  // the same in bf16, for products that take it
    bool attends_rounded_ = false;          // queries lie in their places in bf16
    std::vector<Task> tasks_;
    std::vector<Merge> merges_;
};

}  // namespace

// ---- What ctypes calls

extern "C" {

int splitfire_version() { return 3; }  // of what stands here and in step.py

bool splitfire_runs_here() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("f16c") && (!HAS_BF16_UNITS || __builtin_cpu_supports("avx512bf16"));
}

void* splitfire_engine(int64_t num_threads) { return new StepEngine(num_threads); }
void splitfire_end(void* engine) { delete static_cast<StepEngine*>(engine); }

void splitfire_step(void* engine, const Model* model, const Pool* pool, const Step* step) {
    static_cast<StepEngine*>(engine)->run(*model, *pool, *step);
}

// The token, or -1 where nothing may be drawn.
int64_t splitfire_draw(const Draw* draw) { return draw_token(*draw); }

// Whether products and attention may be asked for in bf16.
bool splitfire_has_bf16_units() { return HAS_BF16_UNITS; }

void splitfire_multiply(void* engine, const Matrix* matrix, const float* x, int64_t rows, float* out) {
    static_cast<StepEngine*>(engine)->multiply_alone(*matrix, x, rows, out);
}

}
