// A trainer in C++ whose parameters are divided among the ranks (ZeRO-3): the runtime gathers each
// layer while the one before computes, sums gradients, updates, and saves.
//
//     c++ -O2 trainer.cpp -lpillion && torchrun --no-python --nproc-per-node 2 ./a.out [FOLDER]
//
// The model is a network of three layers that learns which of two spirals a point lies on.
#include <cmath>
#include <cstdio>
#include <stdexcept>
#include <vector>

#include "pillion.h"

namespace {

constexpr size_t WIDTHS[] = {3, 32, 32, 1};
constexpr size_t LAYERS = 3, POINTS = 64, STEPS = 300;

void check(int32_t code) {
    if (code != PILLION_OK) throw std::runtime_error(pillion_last_error());
}

// A point of a spiral, with a 1 beside it for biases, and which spiral it is of.
float point(size_t number, float *x) {
    float label = static_cast<float>(number % 2), turn = static_cast<float>(number * 37 % 997) / 997.0f;
    float angle = 6.0f * turn + label * 3.14159265f, radius = 0.2f + turn;
    x[0] = radius * std::cos(angle), x[1] = radius * std::sin(angle), x[2] = 1.0f;
    return label;
}

float first_value(void *, const char *name, size_t index) {
    size_t mixed = (index + 1) * 2654435761u + static_cast<size_t>(name[0]) * 40503u;
    return (static_cast<float>(mixed >> 7 & 0xffff) / 65536.0f - 0.5f) * 0.8f;
}

// One micro-batch: forward, then backward, through the layers that the engine lends.
void train(pillion_engine *engine, size_t first) {
    std::vector<float> x[LAYERS + 1] = {std::vector<float>(POINTS * 3)}, labels(POINTS);
    for (size_t p = 0; p < POINTS; p++) labels[p] = point(first + p, &x[0][3 * p]);
    check(pillion_engine_round(engine, POINTS));
    for (size_t layer = 0; layer < LAYERS; layer++) {
        const void *lent = nullptr;
        check(pillion_engine_forward(engine, layer, &lent));
        const float *weights = static_cast<const float *>(lent);
        size_t ins = WIDTHS[layer], outs = WIDTHS[layer + 1];
        x[layer + 1].resize(POINTS * outs);
        for (size_t p = 0; p < POINTS; p++)
            for (size_t o = 0; o < outs; o++) {
                float sum = 0;
                for (size_t i = 0; i < ins; i++) sum += weights[o * ins + i] * x[layer][p * ins + i];
                x[layer + 1][p * outs + o] = layer + 1 < LAYERS ? std::tanh(sum) : sum;
            }
    }
    std::vector<float> after(POINTS);  // gradient of what a layer puts out
    double loss = 0;
    for (size_t p = 0; p < POINTS; p++) {
        float chance = 1 / (1 + std::exp(-x[LAYERS][p]));
        loss -= std::log(labels[p] > 0 ? chance : 1 - chance);
        after[p] = chance - labels[p];
    }
    for (size_t layer = LAYERS; layer-- > 0;) {
        const void *lent = nullptr;
        float *gradients = nullptr;
        double *sum = nullptr;
        check(pillion_engine_backward(engine, layer, &lent, &gradients, &sum));
        const float *weights = static_cast<const float *>(lent);
        size_t ins = WIDTHS[layer], outs = WIDTHS[layer + 1];
        std::vector<float> before(POINTS * ins, 0.0f);
        if (layer + 1 == LAYERS) *sum += loss;
        for (size_t p = 0; p < POINTS; p++)
            for (size_t o = 0; o < outs; o++) {
                float y = x[layer + 1][p * outs + o], slope = layer + 1 < LAYERS ? 1 - y * y : 1;
                float of = after[p * outs + o] * slope;
                for (size_t i = 0; i < ins; i++) {
                    gradients[o * ins + i] += of * x[layer][p * ins + i];
                    before[p * ins + i] += of * weights[o * ins + i];
                }
            }
        after = before;
    }
}
}  // namespace

int main(int count, char **arguments) try {
    pillion_communicator *ranks = nullptr;
    check(pillion_connect(nullptr, &ranks));
    size_t rank = pillion_rank(ranks), world = pillion_world(ranks);
    const char *names[] = {"first", "second", "third"};
    size_t shapes[LAYERS][2];
    pillion_tensor_spec tensors[LAYERS];
    pillion_unit_spec units[LAYERS];
    for (size_t layer = 0; layer < LAYERS; layer++) {
        shapes[layer][0] = WIDTHS[layer + 1], shapes[layer][1] = WIDTHS[layer];
        tensors[layer] = {names[layer], shapes[layer], 2, 0, 0};
        units[layer] = {names[layer], &tensors[layer], 1};
    }
    pillion_policy policy = {sizeof policy, PILLION_SHARD_EVERYTHING, PILLION_F32, PILLION_F32, 1, 0, 1, 0};
    pillion_adamw settings = {0.9f, 0.99f, 1e-8f, 0.0f, 1.0};
    pillion_engine *engine = nullptr;
    check(pillion_engine_new(ranks, units, LAYERS, &policy, &settings, &engine));
    check(pillion_engine_initialize(engine, first_value, nullptr));

    pillion_report report = {};
    for (size_t step = 0; step < STEPS; step++) {
        check(pillion_engine_begin(engine, 1, 0));
        train(engine, (step * world + rank) * POINTS);
        check(pillion_engine_finish(engine, 0.01f, &report));
        if (rank == 0 && step % 50 == 0) std::printf("step %3zu  loss %.4f\n", step, report.loss_sum / report.tokens);
    }
    double last = report.loss_sum / report.tokens;  // Guessing costs 0.69.
    if (rank == 0) std::printf("step %3zu  loss %.4f\n", STEPS, last);
    if (count > 1) check(pillion_engine_save(engine, arguments[1], STEPS));
    check(pillion_engine_free(engine));
    check(pillion_close(ranks));
    return last < 0.2 ? 0 : 1;
} catch (const std::exception &error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
}
