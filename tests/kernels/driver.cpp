// A few calls of every kernel on numbers of its own; the bytes of all results go to standard output.

#include <cstdio>

#include "kernels.cpp"

namespace {

uint32_t state = 1;
float number() {  // -1 to 1
  state = state * 1664525 + 1013904223;
  return static_cast<float>(static_cast<int32_t>(state)) * 0x1p-31f;
}
std::vector<float> numbers(size_t count) {
  std::vector<float> made(count);
  for (float& each : made) each = number();
  return made;
}
template <class T>
void show(const std::vector<T>& values) {
  std::fwrite(values.data(), sizeof(T), values.size(), stdout);
}

// Rows of Q4_0's blocks, of 32 weights each: a scale of about 0.01, half precision, then the codes.
std::vector<uint8_t> q4_0_rows(int64_t n, int64_t k) {
  std::vector<uint8_t> blocks(n * block_row_bytes(2, k));
  for (size_t i = 0; i < blocks.size(); i++)
    blocks[i] = i % 18 == 1 ? 0x21 : static_cast<uint8_t>(number() * 127.5f + 127.5f);
  return blocks;
}

void products(int32_t type, int64_t n, int64_t k) {
  Weight w{type, 0, n, k, nullptr, nullptr};
  w.data = static_cast<uint8_t*>(std::aligned_alloc(4096, (packed_bytes(&w) + 8191) / 4096 * 4096));
  std::memset(w.data, 0, packed_bytes(&w));
  const std::vector<float> dense = numbers(n * k), bias = numbers(n);
  std::vector<double> sums(2 * n);
  if (type == I4C) {
    pack_blocks(&w, q4_0_rows(n, k).data(), 2, nullptr, 0, n, sums.data());
  } else if (type == I4) {
    pack_int4(&w, dense.data(), F32, 0, n, sums.data());
  } else {
    pack(&w, dense.data(), F32, 0, n);
  }
  w.bias = bias.data();
  for (int64_t rows : {1, 2, 3, 7, 40}) {
    const std::vector<float> x = numbers(rows * k);
    std::vector<float> y(rows * n);
    linear(&w, x.data(), rows, k, y.data(), F32);
    show(y);
  }
  const std::vector<int64_t> indices{0, n - 1, n};
  std::vector<float> rows(3 * k);
  unpack_rows(&w, indices.data(), 3, rows.data());
  rows.resize(2 * k);  // the last is NaN, whose bits are nobody's promise
  show(rows);
  std::free(w.data);
}

template <class T>
void attends(int32_t type) {
  constexpr int64_t ROWS = 2, HEADS = 4, KV_HEADS = 2, QUERIES = 5, SIZE = 40, LENGTH = 150;
  const std::vector<float> q = numbers(ROWS * HEADS * QUERIES * SIZE);
  std::vector<T> k(ROWS * KV_HEADS * LENGTH * SIZE), v(k.size());
  for (std::vector<T>* each : {&k, &v})
    for (T& value : *each) store(&value, type, 0, 1, broadcast(number()));
  std::vector<float> out(q.size());
  const int64_t starts[ROWS] = {140, 3};
  Attention call{q.data(), k.data(), v.data(), out.data(), starts, nullptr, nullptr,
                 nullptr, ROWS, QUERIES, HEADS, KV_HEADS, SIZE,
                 {HEADS * QUERIES * SIZE, QUERIES * SIZE, SIZE},
                 {KV_HEADS * LENGTH * SIZE, LENGTH * SIZE, SIZE},
                 {KV_HEADS * LENGTH * SIZE, LENGTH * SIZE, SIZE}, 0, .2f, 30.f, F32, type};
  attention(&call);
  show(out);
  const float slopes[HEADS] = {.5f, .25f, .125f, .0625f};
  call.slopes = slopes, call.softcap = 0, call.window = -48;
  attention(&call);
  show(out);
}

}  // namespace

int main() {
#ifdef ISA_AMX
  syscall(SYS_arch_prctl, 0x1023, 18);  // asks for the tile unit, as kernels/variants.py does
#endif
  set_threads(2);
  for (int32_t type : {F32, BF16, I8, I4})
    for (int64_t n : {64, 50})
      for (int64_t k : {96, 77}) products(type, n, k);
  for (int64_t n : {64, 50})
    for (int64_t k : {96, 128}) products(I4C, n, k);
  attends<float>(F32);
  attends<uint16_t>(BF16);
  const std::vector<float> logits = numbers(1000);
  std::vector<int64_t> tokens(50);
  for (int64_t i = 0; i < 50; i++) {
    const SampleRow row{logits.data(), 1000, state + static_cast<uint64_t>(i) * 977, 40, .5, .9, 0, nullptr};
    sample(&row, 1, &tokens[i]);
  }
  show(tokens);
  std::vector<float> x = numbers(64), y(64);
  for (int32_t op : {RSQRT, EXP, TANH, SILU, GELU, GELU_TANH}) {
    Step step{};
    step.op = op, step.operands = 1, step.scalar = 1;
    for (int64_t& size : step.sizes) size = 1;
    step.sizes[3] = 61;
    const auto operand = [](std::vector<float>& data) {
      return Operand{reinterpret_cast<char*>(data.data()), {64, 64, 64, 1}, F32, 0};
    };
    if (op == RSQRT)
      for (float& each : x) each = std::fabs(each) + 1;
    step.inputs[0] = operand(x), step.out = operand(y);
    run_steps(&step, 1);
    show(y);
  }
}
