// Linear layers, attention and a few small operations for CPUs with AVX-512 (VNNI, BF16).
//
// Built by build.py, called through ctypes (library.py, which mirrors the structs). No torch, no
// Python: pointers in, results out, no exceptions.
//
// The promise of this file: a row's result is the same to the last bit alone and in company. Each
// output is computed by one thread, in an order of summation that depends on the row itself and on
// its layer, never on the number of rows, their places, the number of threads or their luck.

#include <immintrin.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace {

enum Type : int32_t { F32 = 0, BF16 = 1, I8 = 2, I4 = 4 };  // 3 is I64, of operands

// ---- threads ---------------------------------------------------------------------------------

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;

void futex_wait(std::atomic<uint32_t>& word, uint32_t value, long nanoseconds) {
  timespec limit{0, nanoseconds};
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nanoseconds ? &limit : nullptr, nullptr, 0);
}

void futex_wake(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

// The calling thread and its helpers share out one loop at a time.
//
// Each member begins with its own part, always the same one, so that its core finds its share of
// the weights in its own cache; who is done early takes from the others. A helper that is not
// running, because something else has its core, is not waited for: its part is taken. One that
// lost its core in the middle of a piece is waited for. That is borne while it takes less than a
// quarter of the time, as when a token is sent to its client; where it takes more, the team does
// without helpers for a while. Helpers spin for a moment between two loops, giving way to others,
// and then sleep.
class Team {
 public:
  using Body = void (*)(const void*, int64_t, int64_t);

  explicit Team(int size) : size_(size), parts_(new Part[size]) {
    for (int i = 1; i < size; i++) helpers_.emplace_back([this, i] { help(i); });
  }

  ~Team() {
    ended_ = true;
    ring();
    for (auto& helper : helpers_) helper.join();
  }

  int size() const { return size_; }

  // f(begin, end) over parts of 0..n.
  template <class F>
  void run(int64_t n, const F& f) {
    auto body = [](const void* g, int64_t b, int64_t e) { (*static_cast<const F*>(g))(b, e); };
    if (n <= 0) return;
    if (size_ == 1 || n == 1 || (alone_ && Clock::now() < alone_until_)) return f(0, n);
    alone_ = false;
    body_ = body, argument_ = &f, piece_ = std::max<int64_t>(1, n / (size_ * 8));
    for (int i = 0; i < size_; i++) {
      parts_[i].next.store(n * i / size_, std::memory_order_relaxed);
      parts_[i].end = n * (i + 1) / size_;
    }
    ring();
    work(0);
    door_.fetch_and(~OPEN);
    if (door_.load(std::memory_order_acquire) & INSIDE) wait_for_helpers();
  }

 private:
  struct alignas(128) Part {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };
  // door_: number of the loop | whether it may be entered | how many helpers are inside
  static constexpr uint64_t OPEN = 1 << 16, INSIDE = OPEN - 1;
  static constexpr microseconds SPIN{300}, POLITE{20}, LATE{3000}, ALONE{20000}, ALONE_MAX{320000};

  void ring() {
    const uint32_t loop = bell_.load(std::memory_order_relaxed) + 1;
    door_.store(uint64_t{loop} << 32 | OPEN, std::memory_order_release);
    bell_.store(loop);
    if (sleepers_.load()) futex_wake(bell_);
  }

  void work(int me) {
    for (int i = 0; i < size_; i++) {
      Part& part = parts_[(me + i) % size_];
      for (int64_t b; (b = part.next.fetch_add(piece_, std::memory_order_relaxed)) < part.end;)
        body_(argument_, b, std::min(b + piece_, part.end));
    }
  }

  void help(int me) {
    for (uint32_t seen = 0;;) {
      seen = next_loop(seen);
      if (ended_) return;
      uint64_t door = door_.load(std::memory_order_acquire);
      while (door & OPEN &&
             !door_.compare_exchange_weak(door, door + 1, std::memory_order_acq_rel)) {
      }
      if (!(door & OPEN)) continue;
      work(me);
      door_.fetch_sub(1, std::memory_order_release);
      if (waiting_.exchange(0)) futex_wake(waiting_);
    }
  }

  uint32_t next_loop(uint32_t seen) {
    const auto start = Clock::now();
    for (uint32_t turn = 1; bell_.load(std::memory_order_acquire) == seen; turn++) {
      _mm_pause();
      if (turn % 32) continue;
      const auto spent = Clock::now() - start;
      if (spent > SPIN) {
        sleepers_.fetch_add(1);
        futex_wait(bell_, seen, 0);
        sleepers_.fetch_sub(1);
      } else if (spent > POLITE) {
        sched_yield();
      }
    }
    return bell_.load(std::memory_order_acquire);
  }

  void wait_for_helpers() {
    const auto start = Clock::now();
    for (int turn = 1; door_.load(std::memory_order_acquire) & INSIDE; turn++) {
      _mm_pause();
      if (turn % 32 || Clock::now() - start < microseconds(50)) continue;
      waiting_.store(1);
      if (door_.load() & INSIDE) futex_wait(waiting_, 1, 1000000);
    }
    const auto end = Clock::now();
    lost_ = std::max(lost_ - (end - waited_at_) / 4, Clock::duration{}) + (end - start);
    waited_at_ = end;
    if (lost_ < LATE) return;
    lost_ = {};
    penalty_ = end - alone_until_ < 4 * penalty_ ? std::min(2 * penalty_, ALONE_MAX) : ALONE;
    alone_ = true, alone_until_ = end + penalty_;
  }

  const int size_;
  std::unique_ptr<Part[]> parts_;
  Body body_ = nullptr;
  const void* argument_ = nullptr;
  int64_t piece_ = 1;
  alignas(128) std::atomic<uint64_t> door_{0};
  alignas(128) std::atomic<uint32_t> bell_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<uint32_t> waiting_{0};
  std::atomic<bool> ended_{false};
  Clock::duration lost_{};  // by waiting, beyond what is borne
  Clock::time_point waited_at_{};
  bool alone_ = false;
  Clock::time_point alone_until_{};
  microseconds penalty_ = ALONE;
  std::vector<std::thread> helpers_;
};

std::mutex busy;  // one call at a time: they share the team and the scratch memory
Team* team = nullptr;

// ---- numbers ---------------------------------------------------------------------------------

__m512 wide(__m256i v) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}
__mmask16 first(int64_t n) {
  return n >= 16 ? 0xffff : n <= 0 ? 0 : static_cast<__mmask16>((1u << n) - 1);
}

// Sixteen numbers of either type as floats; beyond the mask zeros, and nothing is read.
__m512 load(const float* p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }
__m512 load(const uint16_t* p, __mmask16 mask) { return wide(_mm256_maskz_loadu_epi16(mask, p)); }
__m256i narrow(__m512 v) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)); }
void store(float* p, __mmask16 mask, __m512 v) { _mm512_mask_storeu_ps(p, mask, v); }
void store(uint16_t* p, __mmask16 mask, __m512 v) { _mm256_mask_storeu_epi16(p, mask, narrow(v)); }

__m512 load(const void* p, int32_t type, int64_t at, __mmask16 mask) {
  return type == F32 ? load(static_cast<const float*>(p) + at, mask)
                     : load(static_cast<const uint16_t*>(p) + at, mask);
}
void store(void* p, int32_t type, int64_t at, __mmask16 mask, __m512 v) {
  if (type == F32) return store(static_cast<float*>(p) + at, mask, v);
  store(static_cast<uint16_t*>(p) + at, mask, v);
}

// e to the x, within 2 units in the last place; NaN stays NaN.
__m512 exp16(__m512 x) {
  x = _mm512_min_ps(_mm512_set1_ps(89.f), _mm512_max_ps(_mm512_set1_ps(-104.f), x));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 y = _mm512_set1_ps(1.f / 5040);
  for (float c : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, .5f, 1.f, 1.f})
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(y, n);
}

// Memory that grows and is kept, for what a call prepares from its input.
struct Scratch {
  template <class T>
  T* get(int64_t count) {
    const size_t bytes = (count * sizeof(T) + 4095) / 4096 * 4096;
    if (bytes > size) {
      std::free(data);
      data = std::aligned_alloc(4096, bytes);
      size = data ? bytes : 0;
    }
    return static_cast<T*>(data);
  }
  void* data = nullptr;
  size_t size = 0;
};
Scratch scratch_rows, scratch_scales;

// ---- linear layers ---------------------------------------------------------------------------
//
// Weights (n, k) lie in panels of 32 outputs. Within a panel come, for one step along k after the
// other, two vectors of 16 outputs each; a lane holds the 1, 2 or 4 weights (F32, BF16, I8) of the
// step, to be multiplied with the same 4 bytes of the row. What is missing to whole panels and
// steps is zero. I8 has groups of GROUP weights, each followed by 32 scales in bfloat16.
//
// I4 has groups too, and one vector per step: four bits of a byte are of the first 16 outputs, the
// upper four of the others. Behind a group lie 32 scales and 32 minima in half precision; a weight
// is minimum + scale * (0..15).

constexpr int64_t PANEL = 32, GROUP = 32, GROUP_BYTES = PANEL * GROUP + PANEL * 2;
constexpr int64_t GROUP_STEPS = GROUP / 4;
constexpr int64_t NIBBLES = PANEL * GROUP / 2, NIBBLE_GROUP_BYTES = NIBBLES + PANEL * 4;

}  // namespace

extern "C" {
struct Weight {
  int32_t type;
  int32_t unused;
  int64_t n, k;
  uint8_t* data;
  const float* bias;  // n of them, or null
};
}

namespace {

int64_t panels(const Weight& w) { return (w.n + PANEL - 1) / PANEL; }
int64_t per_step(const Weight& w) { return w.type == F32 ? 1 : w.type == BF16 ? 2 : 4; }
bool in_groups(const Weight& w) { return w.type == I8 || w.type == I4; }
int64_t steps(const Weight& w) {  // along k; the 4-byte lanes of a prepared row
  const int64_t unit = in_groups(w) ? GROUP : per_step(w);
  return (w.k + unit - 1) / unit * unit / per_step(w);
}
int64_t groups(const Weight& w) { return (w.k + GROUP - 1) / GROUP; }
int64_t panel_bytes(const Weight& w) {
  if (w.type == I4) return groups(w) * NIBBLE_GROUP_BYTES;
  return w.type == I8 ? groups(w) * GROUP_BYTES : steps(w) * 2 * 64;
}

struct DotF32 {
  static __m512 add(__m512 sum, __m512i w, int32_t x) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(w), _mm512_castsi512_ps(_mm512_set1_epi32(x)), sum);
  }
};
struct DotBF16 {
  static __m512 add(__m512 sum, __m512i w, int32_t x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32(x));
  }
};

constexpr int64_t AHEAD = 4096;  // bytes

template <int R>
using Sums = __m512[R][2];

// Into the second cache, or into the first where there is no time to fetch it from there.
template <int R>
void prefetch(const uint8_t* p) {
  constexpr _mm_hint hint = R > 6 ? _MM_HINT_T0 : _MM_HINT_T1;
  _mm_prefetch(reinterpret_cast<const char*>(p), hint);
  _mm_prefetch(reinterpret_cast<const char*>(p + 64), hint);
}


// Sums of R prepared rows with one panel.
template <class Dot, int R>
inline void dense_sums(const uint8_t* w, int64_t ahead, const int32_t* x, int64_t n,
                       Sums<R>& sums) {
  for (auto& sum : sums) sum[0] = sum[1] = _mm512_setzero_ps();
#pragma GCC unroll 4
  for (int64_t i = 0; i < n; i++, w += 128) {
    const __m512i w0 = _mm512_load_si512(w), w1 = _mm512_load_si512(w + 64);
    prefetch<R>(w + ahead);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      sums[r][0] = Dot::add(sums[r][0], w0, x[r * n + i]);
      sums[r][1] = Dot::add(sums[r][1], w1, x[r * n + i]);
    }
  }
}

// The scale of a group of a row, and minus 128 times the sum of its numbers: weights are stored
// plus 128, because the instruction wants one side unsigned.
struct GroupInfo {
  float scale;
  int32_t offset;
};

template <int R>
inline void grouped_sums(const uint8_t* w, int64_t ahead, const int32_t* x, const GroupInfo* info,
                         int64_t n, Sums<R>& sums) {
  for (auto& sum : sums) sum[0] = sum[1] = _mm512_setzero_ps();
  for (int64_t g = 0; g < n; g++) {
    __m512i dots[R][2];
    for (int r = 0; r < R; r++) dots[r][0] = dots[r][1] = _mm512_set1_epi32(info[r * n + g].offset);
#pragma GCC unroll 4
    for (int i = 0; i < GROUP_STEPS; i++, w += 128) {
      const __m512i w0 = _mm512_load_si512(w), w1 = _mm512_load_si512(w + 64);
      prefetch<R>(w + ahead);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        const __m512i b = _mm512_set1_epi32(x[r * n * GROUP_STEPS + g * GROUP_STEPS + i]);
        dots[r][0] = _mm512_dpbusd_epi32(dots[r][0], w0, b);
        dots[r][1] = _mm512_dpbusd_epi32(dots[r][1], w1, b);
      }
    }
    const __m512 s0 = wide(_mm256_load_si256(reinterpret_cast<const __m256i*>(w)));
    const __m512 s1 = wide(_mm256_load_si256(reinterpret_cast<const __m256i*>(w + 32)));
    w += 64;
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const __m512 s = _mm512_set1_ps(info[r * n + g].scale);
      const __m512 d0 = _mm512_cvtepi32_ps(dots[r][0]), d1 = _mm512_cvtepi32_ps(dots[r][1]);
      sums[r][0] = _mm512_fmadd_ps(d0, _mm512_mul_ps(s, s0), sums[r][0]);
      sums[r][1] = _mm512_fmadd_ps(d1, _mm512_mul_ps(s, s1), sums[r][1]);
    }
  }
}

// The scale of a group of a row, and the sum of its rounded numbers: what a minimum is times.
struct NibbleInfo {
  float scale, sum;
};

// The upper four bits come out 16 times too large, by subtraction: that saves shifting them.
template <int R>
inline void nibble_sums(const uint8_t* w, int64_t ahead, const int32_t* x, const NibbleInfo* info,
                        int64_t n, Sums<R>& sums) {
  const __m512i lower = _mm512_set1_epi8(15);
  const __m512 sixteenth = _mm512_set1_ps(1.f / 16);
  for (auto& sum : sums) sum[0] = sum[1] = _mm512_setzero_ps();
  for (int64_t g = 0; g < n; g++) {
    __m512i dots[R][2];
    for (auto& dot : dots) dot[0] = dot[1] = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int i = 0; i < GROUP_STEPS; i++, w += 64) {
      const __m512i both = _mm512_load_si512(w), low = _mm512_and_si512(both, lower);
      _mm_prefetch(reinterpret_cast<const char*>(w + ahead), R > 6 ? _MM_HINT_T0 : _MM_HINT_T1);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        const __m512i b = _mm512_set1_epi32(x[r * n * GROUP_STEPS + g * GROUP_STEPS + i]);
        dots[r][0] = _mm512_dpbusd_epi32(dots[r][0], low, b);
        dots[r][1] = _mm512_dpbusd_epi32(dots[r][1], both, b);
      }
    }
    prefetch<R>(w + ahead);
    auto halves = [w](int i) {
      return _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(w) + i));
    };
    const __m512 s0 = halves(0), s1 = _mm512_mul_ps(halves(1), sixteenth);
    const __m512 low0 = halves(2), low1 = halves(3);
    w += PANEL * 4;
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const __m512 s = _mm512_set1_ps(info[r * n + g].scale);
      const __m512 sum = _mm512_set1_ps(info[r * n + g].sum);
      const __m512 d0 = _mm512_cvtepi32_ps(dots[r][0]);
      const __m512 d1 = _mm512_cvtepi32_ps(_mm512_sub_epi32(dots[r][1], dots[r][0]));
      sums[r][0] = _mm512_fmadd_ps(sum, low0, sums[r][0]);
      sums[r][1] = _mm512_fmadd_ps(sum, low1, sums[r][1]);
      sums[r][0] = _mm512_fmadd_ps(d0, _mm512_mul_ps(s, s0), sums[r][0]);
      sums[r][1] = _mm512_fmadd_ps(d1, _mm512_mul_ps(s, s1), sums[r][1]);
    }
  }
}

struct Product {
  const Weight& w;
  const int32_t* x;       // prepared rows
  const GroupInfo* info;  // of I8; of I4 each is a NibbleInfo
  void* y;
  Type y_type;
};

// R rows from m on with panel p. The first rows fetch the panel a little ahead of its use, the
// second ones the next panel: so memory is busy while the processor is.
template <int R>
void tile(const Product& job, int64_t p, int64_t m, int nth) {
  const Weight& w = job.w;
  const uint8_t* panel = w.data + p * panel_bytes(w);
  const int64_t n = steps(w);
  const int32_t* x = job.x + m * n;
  const int64_t ahead = nth == 0 ? AHEAD : nth == 1 ? panel_bytes(w) : 0;
  Sums<R> sums;
  if (w.type == I8) {
    grouped_sums<R>(panel, ahead, x, job.info + m * groups(w), groups(w), sums);
  } else if (w.type == I4) {
    const auto* info = reinterpret_cast<const NibbleInfo*>(job.info + m * groups(w));
    nibble_sums<R>(panel, ahead, x, info, groups(w), sums);
  } else if (w.type == BF16) {
    dense_sums<DotBF16, R>(panel, ahead, x, n, sums);
  } else {
    dense_sums<DotF32, R>(panel, ahead, x, n, sums);
  }
  for (int half = 0; half < 2; half++) {
    const int64_t column = p * PANEL + half * 16;
    if (column >= w.n) break;
    const __mmask16 mask = first(w.n - column);
    const __m512 bias = w.bias ? load(w.bias + column, mask) : _mm512_setzero_ps();
    for (int r = 0; r < R; r++) {
      const __m512 sum = w.bias ? _mm512_add_ps(sums[r][half], bias) : sums[r][half];
      const int64_t at = (m + r) * w.n + column;
      store(job.y, job.y_type, at, mask, sum);
    }
  }
}

// Rows of a tile: with its sums (of I8 two kinds) ROWS just fit 32 registers. A few more are worth
// some spilling, if that saves going through the panel twice.
constexpr int ROWS = 6, MOST = 8;
using Tile = void (*)(const Product&, int64_t, int64_t, int);
template <size_t... I>
constexpr std::array<Tile, sizeof...(I)> make_tiles(std::index_sequence<I...>) {
  return {tile<I + 1>...};
}
constexpr auto TILES = make_tiles(std::make_index_sequence<MOST>{});

// One panel with all rows; the panel stays in the second cache meanwhile.
void all_rows(const Product& job, int64_t p, int64_t rows) {
  int nth = 0;
  for (int64_t m = 0; m < rows; nth++) {
    const int64_t left = rows - m;
    const int64_t r = left <= MOST ? left : left < 2 * ROWS ? (left + 1) / 2 : ROWS;
    TILES[r - 1](job, p, m, nth);
    m += r;
  }
}

// A row in the form that the weights want: floats, pairs of bfloat16, or groups of bytes.
template <class T>
void prepare(const Weight& w, const T* x, int32_t* to) {
  for (int64_t i = 0, lanes = steps(w); i < lanes * per_step(w); i += 16) {
    const __m512 v = load(x + i, first(w.k - i));
    if (w.type == F32) {
      _mm512_mask_storeu_ps(to + i, first(lanes - i), v);
    } else {
      _mm256_mask_storeu_epi32(to + i / 2, first(lanes - i / 2) & 0xff, narrow(v));
    }
  }
}

template <class T>
void prepare_groups(const Weight& w, const T* x, int32_t* to, GroupInfo* info) {
  for (int64_t g = 0; g < groups(w); g++) {
    __m512 v[GROUP / 16];
    __m512i largest = _mm512_setzero_si512();  // as bits: so inf and NaN are the largest
    for (int j = 0; j < GROUP / 16; j++) {
      const int64_t at = g * GROUP + j * 16;
      v[j] = load(x + at, first(w.k - at));
      largest = _mm512_max_epu32(largest, _mm512_castps_si512(_mm512_abs_ps(v[j])));
    }
    const uint32_t bits = _mm512_reduce_max_epu32(largest);
    float peak;
    std::memcpy(&peak, &bits, 4);
    const bool finite = bits < 0x7f800000;
    const __m512 inverse = _mm512_set1_ps(finite && peak > 1e-30f ? 127 / peak : 0);
    __m512i sum = _mm512_setzero_si512();
    for (int j = 0; j < GROUP / 16; j++) {
      const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(v[j], inverse));
      sum = _mm512_add_epi32(sum, q);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + g * GROUP_STEPS + j * 4),
                       _mm512_cvtsepi32_epi8(q));
    }
    info[g] = {finite ? peak / 127 : std::numeric_limits<float>::quiet_NaN(),
               -128 * _mm512_reduce_add_epi32(sum)};
  }
}

void become_nibble_info(GroupInfo* info, int64_t count) {
  static_assert(sizeof(NibbleInfo) == sizeof(GroupInfo));
  for (GroupInfo* i = info; i < info + count; i++) {
    const NibbleInfo made{i->scale, i->scale * static_cast<float>(i->offset / -128)};
    std::memcpy(i, &made, sizeof made);
  }
}

template <class T>
void prepare_row(const Weight& w, const T* x, int64_t m, int32_t* to, GroupInfo* info) {
  if (in_groups(w)) {
    prepare_groups(w, x, to + m * steps(w), info + m * groups(w));
    if (w.type == I4) become_nibble_info(info + m * groups(w), groups(w));
  } else {
    prepare(w, x, to + m * steps(w));
  }
}

// ---- attention -------------------------------------------------------------------------------
//
// A query at position p sees the keys 0..p of its row, or the last ``window`` of them. It goes
// through them in blocks that begin at multiples of BLOCK, with a running maximum: so it makes no
// difference which queries share the call, whether a prompt came in one piece or token by token.

}  // namespace

extern "C" {
struct Attention {
  const void *q, *k, *v;  // (rows, heads, queries, size), (rows, kv_heads, length, size) twice
  void* out;              // (rows, queries, heads, size), contiguous, of q's type
  const int64_t* starts;  // position of the first query of each row
  const float* sinks;     // per head, a score that takes part without a value; or null
  int64_t rows, queries, heads, kv_heads, size;
  int64_t q_strides[3], k_strides[3], v_strides[3];  // row, head, position; in elements
  int64_t window;                                    // 0: all
  float scale, softcap;                              // softcap 0: none
  int32_t q_type, kv_type;
};
}

namespace {

constexpr int64_t BLOCK = 64, QUERIES = 16, MAX_SIZE = 256;

struct Query {
  int64_t begin, end;  // the keys that it sees
  float peak, total;
  alignas(64) float q[MAX_SIZE];
  alignas(64) float sum[MAX_SIZE];
};

// Lane i is the sum of vector i.
__m512 sums_of(const __m512 (&v)[16]) {
  __m512 quads[4];
  for (int i = 0; i < 4; i++) {
    auto pair = [](__m512 a, __m512 b) {
      return _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    };
    const __m512d d = pair(v[4 * i], v[4 * i + 1]), e = pair(v[4 * i + 2], v[4 * i + 3]);
    quads[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(d, e)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(d, e)));
  }
  auto merge = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return merge(merge(quads[0], quads[1]), merge(quads[2], quads[3]));
}

__m512 capped(__m512 scores, float cap) {  // cap * tanh(scores / cap)
  const __m512 one = _mm512_set1_ps(1), e = exp16(_mm512_mul_ps(scores, _mm512_set1_ps(2 / cap)));
  const __m512 part = _mm512_div_ps(_mm512_set1_ps(2), _mm512_add_ps(e, one));
  return _mm512_mul_ps(_mm512_set1_ps(cap), _mm512_sub_ps(one, part));
}

// Scores of 16 keys from ``key`` on; those that ``mask`` hides are not read.
template <class T, int V>
inline __m512 scores_of(const Attention& a, const Query& query, const T* key, __mmask16 mask) {
  const __mmask16 tail = first(a.size - (V - 1) * 16);
  __m512 dots[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) {
    dots[i] = _mm512_setzero_ps();
    if (!(mask >> i & 1)) continue;
    const T* k = key + i * a.k_strides[2];
#pragma GCC unroll 16
    for (int j = 0; j < V; j++)
      dots[i] = _mm512_fmadd_ps(load(k + 16 * j, j == V - 1 ? tail : 0xffff),
                                _mm512_load_ps(query.q + 16 * j), dots[i]);
  }
  const __m512 scores = _mm512_mul_ps(sums_of(dots), _mm512_set1_ps(a.scale));
  return a.softcap ? capped(scores, a.softcap) : scores;
}

template <class T, int V>
void see_block(const Attention& a, Query& query, const T* keys, const T* values, int64_t block) {
  const int64_t begin = std::max(query.begin, block), end = std::min(query.end, block + BLOCK);
  if (begin >= end) return;
  const __m512 none = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  __m512 scores[BLOCK / 16], peak = none;
  __mmask16 masks[BLOCK / 16];
  for (int64_t i = 0; i < BLOCK / 16; i++) {
    const int64_t at = block + 16 * i;
    masks[i] = first(end - at) & ~first(begin - at);
    if (!masks[i]) continue;
    scores[i] = scores_of<T, V>(a, query, keys + at * a.k_strides[2], masks[i]);
    peak = _mm512_mask_max_ps(peak, masks[i], peak, scores[i]);
  }
  const float highest = std::max(query.peak, _mm512_reduce_max_ps(peak));
  const float faded = _mm512_cvtss_f32(exp16(_mm512_set1_ps(query.peak - highest)));
  query.peak = highest;
  const __mmask16 tail = first(a.size - (V - 1) * 16);
  __m512 sum[V], total = _mm512_setzero_ps();
  for (int j = 0; j < V; j++)
    sum[j] = _mm512_mul_ps(_mm512_load_ps(query.sum + 16 * j), _mm512_set1_ps(faded));
  alignas(64) float parts[BLOCK];
  for (int64_t i = 0; i < BLOCK / 16; i++) {
    if (!masks[i]) continue;
    const __m512 part = exp16(_mm512_sub_ps(scores[i], _mm512_set1_ps(highest)));
    total = _mm512_mask_add_ps(total, masks[i], total, part);
    _mm512_store_ps(parts + 16 * i, part);
  }
  for (int64_t at = begin; at < end; at++) {
    const T* value = values + at * a.v_strides[2];
    const __m512 part = _mm512_set1_ps(parts[at - block]);
#pragma GCC unroll 16
    for (int j = 0; j < V; j++)
      sum[j] = _mm512_fmadd_ps(part, load(value + 16 * j, j == V - 1 ? tail : 0xffff), sum[j]);
  }
  for (int j = 0; j < V; j++) _mm512_store_ps(query.sum + 16 * j, sum[j]);
  query.total = query.total * faded + _mm512_reduce_add_ps(total);
}

void finish(const Attention& a, const Query& query, int64_t head, int64_t to) {
  float total = query.total, faded = 1;
  if (a.sinks) {
    const float highest = std::max(query.peak, a.sinks[head]);
    faded = std::exp(query.peak - highest);
    total = total * faded + std::exp(a.sinks[head] - highest);
  }
  const __m512 factor = _mm512_set1_ps(faded / total);
  for (int64_t j = 0; j < a.size; j += 16)
    store(a.out, a.q_type, to * a.size + j, first(a.size - j),
          _mm512_mul_ps(_mm512_load_ps(query.sum + j), factor));
}

// A few queries of one row with the heads that share its keys and values.
struct Share {
  int64_t row, kv_head, head, heads, query, queries;
};

template <class T, int V>
void attend(const Attention& a, const Share& s, Query* state) {
  const T* keys = static_cast<const T*>(a.k) + s.row * a.k_strides[0] + s.kv_head * a.k_strides[1];
  const T* values =
      static_cast<const T*>(a.v) + s.row * a.v_strides[0] + s.kv_head * a.v_strides[1];
  const int64_t count = s.heads * s.queries;
  auto head_of = [&](int64_t i) { return s.head + i % s.heads; };
  auto query_of = [&](int64_t i) { return s.query + i / s.heads; };
  for (int64_t i = 0; i < count; i++) {
    Query& query = state[i];
    query.end = a.starts[s.row] + query_of(i) + 1;
    query.begin = a.window ? std::max<int64_t>(0, query.end - a.window) : 0;
    query.peak = -std::numeric_limits<float>::max(), query.total = 0;
    const int64_t at = s.row * a.q_strides[0] + head_of(i) * a.q_strides[1] +
                       query_of(i) * a.q_strides[2];
    for (int64_t j = 0; j < V * 16; j += 16) {
      _mm512_store_ps(query.q + j, load(a.q, a.q_type, at + j, first(a.size - j)));
      _mm512_store_ps(query.sum + j, _mm512_setzero_ps());
    }
  }
  for (int64_t block = state[0].begin / BLOCK * BLOCK; block < state[count - 1].end; block += BLOCK)
    for (int64_t i = 0; i < count; i++) see_block<T, V>(a, state[i], keys, values, block);
  for (int64_t i = 0; i < count; i++)
    finish(a, state[i], head_of(i), (s.row * a.queries + query_of(i)) * a.heads + head_of(i));
}

using Attend = void (*)(const Attention&, const Share&, Query*);
template <class T, size_t... I>
constexpr std::array<Attend, sizeof...(I)> make_attends(std::index_sequence<I...>) {
  return {attend<T, I + 1>...};
}
template <class T>
constexpr auto ATTENDS = make_attends<T>(std::make_index_sequence<MAX_SIZE / 16>{});

// ---- packing ---------------------------------------------------------------------------------

// The 4 bytes of output ``row`` at a step, as an index from its panel's first byte in units of 4.
int64_t cell(const Weight& w, int64_t row, int64_t step) {
  const int64_t at = step * PANEL + row % PANEL;
  return w.type == I8 ? at + step / GROUP_STEPS * (GROUP_BYTES - PANEL * GROUP) / 4 : at;
}

uint8_t* panel_of(const Weight& w, int64_t row) { return w.data + row / PANEL * panel_bytes(w); }

uint16_t& scale_of(const Weight& w, int64_t row, int64_t g) {
  uint8_t* scales = panel_of(w, row) + g * GROUP_BYTES + PANEL * GROUP;
  return reinterpret_cast<uint16_t*>(scales)[row % PANEL];
}

float bf16(uint16_t value) {
  const uint32_t bits = uint32_t{value} << 16;
  float number;
  std::memcpy(&number, &bits, 4);
  return number;
}

// A group's weights are rounded by the scale as it is stored, so its own rounding costs nothing.
void pack_group(const Weight& w, const float* x, int64_t row, int64_t g, int8_t* to) {
  float peak = 0;
  for (int i = 0; i < GROUP; i++) peak = std::max(peak, std::fabs(x[i]));
  uint16_t stored[16];
  store(stored, 1, _mm512_set1_ps(peak / 127));
  const float scale = bf16(stored[0]);
  scale_of(w, row, g) = stored[0];
  for (int i = 0; i < GROUP; i++) {
    const float value = scale > 1e-30f ? x[i] / scale : 0;
    to[i] = static_cast<int8_t>(std::lrint(std::clamp(value, -127.f, 127.f)) ^ 0x80);
  }
}

template <class T>
void pack_row(const Weight& w, const T* from, int64_t row) {
  std::vector<int32_t> lanes(steps(w));
  if (w.type == I8) {
    for (int64_t g = 0; g < groups(w); g++) {
      float x[GROUP];
      for (int i = 0; i < GROUP; i += 16)
        store(x + i, 0xffff, load(from + g * GROUP + i, first(w.k - g * GROUP - i)));
      pack_group(w, x, row, g, reinterpret_cast<int8_t*>(lanes.data()) + g * GROUP);
    }
  } else {
    prepare(w, from, lanes.data());
  }
  int32_t* panel = reinterpret_cast<int32_t*>(panel_of(w, row));
  for (int64_t i = 0; i < steps(w); i++) panel[cell(w, row, i)] = lanes[i];
}

// ---- packing into four bits ------------------------------------------------------------------

// Of sixteen groups at once, one per lane. ``error`` is what is lost, squared.
struct Nibbles {
  __m512 scale, low, error;
};

__m512 in_half(__m512 v) { return _mm512_cvtph_ps(_mm512_cvtps_ph(v, 0)); }

// Which of 0..15 stands for x.
__m512 nibble(__m512 x, const Nibbles& n, __m512 inverse) {
  const __m512 q = _mm512_roundscale_ps(_mm512_mul_ps(_mm512_sub_ps(x, n.low), inverse), 8);
  return _mm512_min_ps(_mm512_max_ps(q, _mm512_setzero_ps()), _mm512_set1_ps(15));
}

__m512 inverse_of(__m512 scale) {
  const __mmask16 some = _mm512_cmp_ps_mask(scale, _mm512_setzero_ps(), _CMP_GT_OQ);
  return _mm512_maskz_div_ps(some, _mm512_set1_ps(1), scale);
}

// Takes scale and minimum, as they would be stored, where they lose less than the best so far.
void try_out(const __m512 (&x)[GROUP], __m512 scale, __m512 low, Nibbles& best) {
  Nibbles tried{in_half(scale), in_half(low), _mm512_setzero_ps()};
  const __m512 inverse = inverse_of(tried.scale);
  for (const __m512& v : x) {
    const __m512 q = nibble(v, tried, inverse);
    const __m512 lost = _mm512_sub_ps(v, _mm512_fmadd_ps(q, tried.scale, tried.low));
    tried.error = _mm512_fmadd_ps(lost, lost, tried.error);
  }
  const __mmask16 better = _mm512_cmp_ps_mask(tried.error, best.error, _CMP_LT_OQ);
  best.scale = _mm512_mask_mov_ps(best.scale, better, tried.scale);
  best.low = _mm512_mask_mov_ps(best.low, better, tried.low);
  best.error = _mm512_mask_mov_ps(best.error, better, tried.error);
}

// The line that lies nearest to the numbers (least squares) if they keep the nibbles that scale
// and minimum give them.
void try_line(const __m512 (&x)[GROUP], __m512 scale, __m512 low, Nibbles& best) {
  const Nibbles from{scale, low, low};
  const __m512 inverse = inverse_of(scale), n = _mm512_set1_ps(GROUP);
  __m512 sum_x = _mm512_setzero_ps(), sum_q = sum_x, sum_qq = sum_x, sum_qx = sum_x;
  for (const __m512& v : x) {
    const __m512 q = nibble(v, from, inverse);
    sum_x = _mm512_add_ps(sum_x, v), sum_q = _mm512_add_ps(sum_q, q);
    sum_qq = _mm512_fmadd_ps(q, q, sum_qq), sum_qx = _mm512_fmadd_ps(q, v, sum_qx);
  }
  const __m512 spread = _mm512_fmsub_ps(n, sum_qq, _mm512_mul_ps(sum_q, sum_q));
  const __m512 slope = _mm512_div_ps(
      _mm512_fmsub_ps(n, sum_qx, _mm512_mul_ps(sum_q, sum_x)), spread);
  const __m512 start = _mm512_div_ps(_mm512_fnmadd_ps(slope, sum_q, sum_x), n);
  const __mmask16 is_line = _mm512_cmp_ps_mask(spread, _mm512_setzero_ps(), _CMP_GT_OQ);
  try_out(x, _mm512_mask_mov_ps(scale, is_line, slope), _mm512_mask_mov_ps(low, is_line, start),
          best);
}

// From the whole range of each group on, narrower and wider ones, each as the line nearest to the
// numbers. Numbers that four bits were made of before are found at once.
Nibbles fitted(const __m512 (&x)[GROUP]) {
  __m512 low = x[0], high = x[0], square = _mm512_setzero_ps();
  for (const __m512& v : x) {
    low = _mm512_min_ps(low, v), high = _mm512_max_ps(high, v);
    square = _mm512_fmadd_ps(v, v, square);
  }
  const __m512 range = _mm512_sub_ps(high, low);
  Nibbles best{low, low, _mm512_set1_ps(std::numeric_limits<float>::infinity())};
  try_out(x, _mm512_div_ps(range, _mm512_set1_ps(15)), low, best);
  const __m512 nothing = _mm512_mul_ps(square, _mm512_set1_ps(1e-7f));
  if (_mm512_cmp_ps_mask(best.error, nothing, _CMP_LE_OQ) == 0xffff) return best;
  const __m512 middle = _mm512_fmadd_ps(range, _mm512_set1_ps(.5f), low);
  for (float levels = 13; levels < 20; levels += .5f) {
    const __m512 scale = _mm512_div_ps(range, _mm512_set1_ps(levels));
    try_line(x, scale, _mm512_fnmadd_ps(scale, _mm512_set1_ps(7.5f), middle), best);
    try_line(x, scale, low, best);
    try_line(x, scale, _mm512_fnmadd_ps(scale, _mm512_set1_ps(15), high), best);
  }
  for (int i = 0; i < 3; i++) try_line(x, best.scale, best.low, best);
  return best;
}

uint8_t* nibbles_of(const Weight& w, int64_t row, int64_t g) {
  return panel_of(w, row) + g * NIBBLE_GROUP_BYTES;
}

// Groups g.. of a row, up to sixteen. Adds to ``sums`` what is lost, squared, and the squares.
void pack_nibbles(const Weight& w, const float* from, int64_t row, int64_t g, double* sums) {
  const int64_t count = std::min<int64_t>(16, groups(w) - g);
  alignas(64) float x[GROUP][16] = {};
  for (int64_t lane = 0; lane < count; lane++) {
    const int64_t at = (g + lane) * GROUP;  // what is missing repeats the first: no wider range
    for (int64_t i = 0; i < GROUP; i++) x[i][lane] = from[at + i < w.k ? at + i : at];
  }
  __m512 v[GROUP], squares = _mm512_setzero_ps();
  for (int i = 0; i < GROUP; i++) {
    v[i] = _mm512_load_ps(x[i]);
    squares = _mm512_fmadd_ps(v[i], v[i], squares);
  }
  const Nibbles best = fitted(v);
  sums[0] += _mm512_reduce_add_ps(best.error), sums[1] += _mm512_reduce_add_ps(squares);
  const __m512 inverse = inverse_of(best.scale);
  for (int i = 0; i < GROUP; i++) _mm512_store_ps(x[i], nibble(v[i], best, inverse));
  alignas(32) uint16_t scales[16], lows[16];
  _mm256_store_si256(reinterpret_cast<__m256i*>(scales), _mm512_cvtps_ph(best.scale, 0));
  _mm256_store_si256(reinterpret_cast<__m256i*>(lows), _mm512_cvtps_ph(best.low, 0));
  const int64_t lane_of_row = row % PANEL, shift = lane_of_row < 16 ? 0 : 4;
  for (int64_t lane = 0; lane < count; lane++) {
    uint8_t* to = nibbles_of(w, row, g + lane);
    for (int64_t i = 0; i < GROUP; i++)
      to[i / 4 * 64 + lane_of_row % 16 * 4 + i % 4] |= static_cast<uint8_t>(x[i][lane]) << shift;
    uint16_t* numbers = reinterpret_cast<uint16_t*>(to + NIBBLES) + lane_of_row;
    numbers[0] = scales[lane], numbers[PANEL] = lows[lane];
  }
}

float half(uint16_t value) {
  return _mm512_cvtss_f32(_mm512_cvtph_ps(_mm256_set1_epi16(static_cast<int16_t>(value))));
}

void unpack_nibbles(const Weight& w, int64_t row, float* to) {
  const int64_t lane = row % PANEL, shift = lane < 16 ? 0 : 4;
  for (int64_t g = 0; g < groups(w); g++) {
    const uint8_t* from = nibbles_of(w, row, g);
    const uint16_t* numbers = reinterpret_cast<const uint16_t*>(from + NIBBLES) + lane;
    const float scale = half(numbers[0]), low = half(numbers[PANEL]);
    for (int64_t i = 0; i < std::min(GROUP, w.k - g * GROUP); i++) {
      const int q = from[i / 4 * 64 + lane % 16 * 4 + i % 4] >> shift & 15;
      to[g * GROUP + i] = std::fma(static_cast<float>(q), scale, low);
    }
  }
}

void unpack_row(const Weight& w, int64_t row, float* to) {
  if (w.type == I4) return unpack_nibbles(w, row, to);
  const int32_t* panel = reinterpret_cast<const int32_t*>(panel_of(w, row));
  for (int64_t i = 0, per = per_step(w); i * per < w.k; i++) {
    const int32_t lane = panel[cell(w, row, i)];
    const float scale = w.type == I8 ? bf16(scale_of(w, row, i / GROUP_STEPS)) : 0;
    for (int64_t j = 0; j < std::min(per, w.k - i * per); j++) {
      float& value = to[i * per + j];
      if (w.type == I8) {
        value = static_cast<int8_t>(lane >> 8 * j ^ 0x80) * scale;
      } else if (w.type == BF16) {
        value = bf16(static_cast<uint16_t>(lane >> 16 * j));
      } else {
        std::memcpy(&value, &lane, 4);
      }
    }
  }
}

}  // namespace

extern "C" {

// Threads that share a call, the caller included.
void set_threads(int32_t count) {
  std::lock_guard<std::mutex> lock(busy);
  if (team && team->size() == count) return;
  delete team;
  team = new Team(std::max(1, count));
}

int64_t packed_bytes(const Weight* w) { return panels(*w) * panel_bytes(*w); }

// Rows ``row``.. from a dense (count, k) matrix, F32 or BF16. The memory must have been zeroed.
void pack(const Weight* w, const void* from, int32_t type, int64_t row, int64_t count) {
  std::lock_guard<std::mutex> lock(busy);
  team->run(count, [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; i++) {
      if (type == F32) {
        pack_row(*w, static_cast<const float*>(from) + i * w->k, row + i);
      } else {
        pack_row(*w, static_cast<const uint16_t*>(from) + i * w->k, row + i);
      }
    }
  });
}

// The same for I4. ``sums`` (count, 2): of each row what was lost, squared, and its squares. Rows of
// one panel share bytes, so one thread packs them.
void pack_int4(const Weight* w, const void* from, int32_t type, int64_t row, int64_t count,
               double* sums) {
  std::lock_guard<std::mutex> lock(busy);
  team->run((row + count - 1) / PANEL - row / PANEL + 1, [&](int64_t b, int64_t e) {
    std::vector<float> x(w->k);
    const int64_t begin = std::max(row, (row / PANEL + b) * PANEL);
    const int64_t end = std::min(row + count, (row / PANEL + e) * PANEL);
    for (int64_t r = begin; r < end; r++) {
      for (int64_t i = 0; i < w->k; i += 16) {
        const __mmask16 mask = first(w->k - i);
        store(x.data() + i, mask, load(from, type, (r - row) * w->k + i, mask));
      }
      for (int64_t g = 0; g < groups(*w); g += 16)
        pack_nibbles(*w, x.data(), r, g, sums + (r - row) * 2);
    }
  });
}

// The weights' rows with these numbers, as (count, k) floats; NaN for a number that is none.
void rows_of(const Weight* w, const int64_t* numbers, int64_t count, float* to) {
  std::lock_guard<std::mutex> lock(busy);
  team->run(count, [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; i++) {
      if (numbers[i] >= 0 && numbers[i] < w->n) {
        unpack_row(*w, numbers[i], to + i * w->k);
      } else {
        std::fill_n(to + i * w->k, w->k, std::numeric_limits<float>::quiet_NaN());
      }
    }
  });
}

// y (rows, n) = x (rows, k) times the weights; x and y of the same type, F32 or BF16.
void linear(const Weight* w, const void* x, int64_t rows, int64_t x_stride, void* y, int32_t type) {
  std::lock_guard<std::mutex> lock(busy);
  int32_t* prepared = scratch_rows.get<int32_t>(rows * steps(*w));
  GroupInfo* info = in_groups(*w) ? scratch_scales.get<GroupInfo>(rows * groups(*w)) : nullptr;
  auto prepare_rows = [&](int64_t b, int64_t e) {
    for (int64_t m = b; m < e; m++) {
      if (type == F32) {
        prepare_row(*w, static_cast<const float*>(x) + m * x_stride, m, prepared, info);
      } else {
        prepare_row(*w, static_cast<const uint16_t*>(x) + m * x_stride, m, prepared, info);
      }
    }
  };
  if (rows * w->k < 32768) {
    prepare_rows(0, rows);
  } else {
    team->run(rows, prepare_rows);
  }
  const Product job{*w, prepared, info, y, static_cast<Type>(type)};
  team->run(panels(*w), [&](int64_t b, int64_t e) {
    for (int64_t p = b; p < e; p++) all_rows(job, p, rows);
  });
}

// See Attention.
void attention(const Attention* call) {
  std::lock_guard<std::mutex> lock(busy);
  const Attention& a = *call;
  const int64_t together = a.heads / a.kv_heads;
  // with much to do the heads of a group stay together, so that keys are fetched once for them
  const bool split = a.rows * a.kv_heads * a.queries < 8 * team->size();
  const int64_t heads = split ? 1 : together;
  const int64_t queries = std::max<int64_t>(1, QUERIES / heads);
  const int64_t tiles = (a.queries + queries - 1) / queries;
  const int64_t per_row = a.heads / heads * tiles;
  const int64_t vectors = (a.size + 15) / 16 - 1;
  const Attend attend = a.kv_type == F32 ? ATTENDS<float>[vectors] : ATTENDS<uint16_t>[vectors];
  team->run(a.rows * per_row, [&](int64_t b, int64_t e) {
    static thread_local std::vector<Query> state;
    state.resize(std::max<size_t>(state.size(), heads * queries));
    for (int64_t i = b; i < e; i++) {
      // tiles of late queries see more keys: neighbours are an early and a late one
      const int64_t nth = i % tiles, tile = nth % 2 ? tiles - 1 - nth / 2 : nth / 2;
      const int64_t head = i % per_row / tiles * heads, query = tile * queries;
      const Share share{i / per_row, head / together, head, heads, query,
                        std::min(queries, a.queries - query)};
      attend(a, share, state.data());
    }
  });
}

struct Copy {
  const void* from;  // (rows, heads, queries, size)
  void* to;          // (rows, heads, length, size), from each row's start on
  const int64_t* starts;
  int64_t rows, heads, queries, size;
  int64_t from_strides[3], to_strides[3];
  int32_t from_type, to_type;
};

// New keys or values into their rows of the cache.
void write_cache(const Copy* call) {
  std::lock_guard<std::mutex> lock(busy);
  const Copy& c = *call;
  for (int64_t i = 0; i < c.rows * c.heads * c.queries; i++) {
    const int64_t row = i / c.queries / c.heads, head = i / c.queries % c.heads, t = i % c.queries;
    const int64_t a = row * c.from_strides[0] + head * c.from_strides[1] + t * c.from_strides[2];
    const int64_t b = row * c.to_strides[0] + head * c.to_strides[1] +
                      (c.starts[row] + t) * c.to_strides[2];
    for (int64_t j = 0; j < c.size; j += 16) {
      const __mmask16 mask = first(c.size - j);
      store(c.to, c.to_type, b + j, mask, load(c.from, c.from_type, a + j, mask));
    }
  }
}

// ---- recorded steps --------------------------------------------------------------------------
//
// What lies between the products of a model, as a list of operations over memory that was laid out
// beforehand (program.py). One call runs a whole forward pass.

enum Op : int32_t {
  COPY, ADD, SUB, MUL, DIV, NEG, CUBE, RSQRT, SQRT, EXP, TANH, SILU, SIGMOID, GELU, GELU_TANH, RELU,
  COS, SIN, MEAN, LAYER_NORM, GATHER, LINEAR, ATTENTION, WRITE_CACHE, ROWS_OF,
};

struct Operand {
  char* data;
  int64_t strides[4];  // in elements
  int32_t type, unused;
};

struct Step {
  int32_t op, operands;
  int64_t sizes[4];
  Operand out, in[3];
  double number;
  const void* call;  // Weight, Attention or Copy
};

}  // extern "C"

namespace {

constexpr int32_t I64 = 3;
constexpr int64_t WORTH_SHARING = 16384;  // elements

char* at(const Operand& o, int64_t index) {
  return o.data + index * (o.type == F32 ? 4 : o.type == BF16 ? 2 : 8);
}

float element(const Operand& o, int64_t index) {
  const char* p = at(o, index);
  if (o.type == F32) return *reinterpret_cast<const float*>(p);
  if (o.type == BF16) return bf16(*reinterpret_cast<const uint16_t*>(p));
  return static_cast<float>(*reinterpret_cast<const int64_t*>(p));
}

__m512 elements(const Operand& o, int64_t from, int64_t stride, __mmask16 mask) {
  if (stride == 0) return _mm512_set1_ps(element(o, from));
  if (stride == 1 && o.type == F32) return load(reinterpret_cast<const float*>(at(o, from)), mask);
  if (stride == 1 && o.type == BF16)
    return load(reinterpret_cast<const uint16_t*>(at(o, from)), mask);
  alignas(64) float found[16] = {};
  for (int i = 0; i < 16; i++)
    if (mask >> i & 1) found[i] = element(o, from + i * stride);
  return _mm512_load_ps(found);
}

void put(const Operand& o, int64_t to, int64_t stride, __mmask16 mask, __m512 v) {
  if (stride == 1 && o.type == F32) return store(reinterpret_cast<float*>(at(o, to)), mask, v);
  if (stride == 1 && o.type == BF16) return store(reinterpret_cast<uint16_t*>(at(o, to)), mask, v);
  alignas(64) float values[16];
  _mm512_store_ps(values, v);
  for (int i = 0; i < 16; i++) {
    if (!(mask >> i & 1)) continue;
    char* p = at(o, to + i * stride);
    if (o.type == F32) *reinterpret_cast<float*>(p) = values[i];
    if (o.type == BF16) store(reinterpret_cast<uint16_t*>(p), 1, _mm512_set1_ps(values[i]));
    if (o.type == I64) *reinterpret_cast<int64_t*>(p) = static_cast<int64_t>(values[i]);
  }
}

template <float (*F)(float)>
__m512 each(__m512 v) {
  alignas(64) float values[16];
  _mm512_store_ps(values, v);
  for (float& value : values) value = F(value);
  return _mm512_load_ps(values);
}

__m512 sigmoid(__m512 x) {
  const __m512 one = _mm512_set1_ps(1);
  return _mm512_div_ps(one, _mm512_add_ps(one, exp16(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

float gelu(float x) { return x * .5f * (1 + std::erf(x * 0.70710678f)); }

__m512 gelu_tanh(__m512 x) {  // x * sigmoid(2u): tanh(u) = 2 sigmoid(2u) - 1
  const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
  const __m512 u = _mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), x);
  return _mm512_mul_ps(x, sigmoid(_mm512_mul_ps(u, _mm512_set1_ps(1.5957691216f))));
}

__m512 apply(int32_t op, __m512 a, __m512 b, float number) {
  switch (op) {
    case ADD: return _mm512_fmadd_ps(b, _mm512_set1_ps(number), a);
    case SUB: return _mm512_fnmadd_ps(b, _mm512_set1_ps(number), a);
    case MUL: return _mm512_mul_ps(a, b);
    case DIV: return _mm512_div_ps(a, b);
    case NEG: return _mm512_sub_ps(_mm512_set1_ps(-0.f), a);
    case CUBE: return _mm512_mul_ps(_mm512_mul_ps(a, a), a);
    case RSQRT: return _mm512_div_ps(_mm512_set1_ps(1), _mm512_sqrt_ps(a));
    case SQRT: return _mm512_sqrt_ps(a);
    case EXP: return each<std::exp>(a);
    case TANH: return each<std::tanh>(a);
    case SILU: return _mm512_mul_ps(a, sigmoid(a));
    case SIGMOID: return sigmoid(a);
    case GELU: return each<gelu>(a);
    case GELU_TANH: return gelu_tanh(a);
    case RELU: return _mm512_max_ps(_mm512_setzero_ps(), a);
    case COS: return each<std::cos>(a);
    case SIN: return each<std::sin>(a);
    default: return a;
  }
}

// Where the index-th line along the last dimension begins.
int64_t line(const Step& s, const Operand& o, int64_t index) {
  const int64_t k = index % s.sizes[2], j = index / s.sizes[2] % s.sizes[1];
  return index / s.sizes[2] / s.sizes[1] * o.strides[0] + j * o.strides[1] + k * o.strides[2];
}

void elementwise(const Step& s, int64_t index) {
  const int64_t n = s.sizes[3], to = line(s, s.out, index), a = line(s, s.in[0], index);
  const int64_t b = s.operands > 1 ? line(s, s.in[1], index) : 0;
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = first(n - i);
    const __m512 x = elements(s.in[0], a + i * s.in[0].strides[3], s.in[0].strides[3], mask);
    const __m512 y = s.operands > 1
        ? elements(s.in[1], b + i * s.in[1].strides[3], s.in[1].strides[3], mask) : x;
    put(s.out, to + i * s.out.strides[3], s.out.strides[3], mask,
        apply(s.op, x, y, static_cast<float>(s.number)));
  }
}

float sum_of(const Step& s, const Operand& o, int64_t from, float center, bool squares) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < s.sizes[3]; i += 16) {
    const __mmask16 mask = first(s.sizes[3] - i);
    __m512 v = elements(o, from + i * o.strides[3], o.strides[3], mask);
    v = _mm512_maskz_sub_ps(mask, v, _mm512_set1_ps(center));
    sum = squares ? _mm512_fmadd_ps(v, v, sum) : _mm512_add_ps(sum, v);
  }
  return _mm512_reduce_add_ps(sum);
}

void mean(const Step& s, int64_t index) {
  const float sum = sum_of(s, s.in[0], line(s, s.in[0], index), 0, false);
  put(s.out, line(s, s.out, index), 1, 1, _mm512_set1_ps(sum / s.sizes[3]));
}

void layer_norm(const Step& s, int64_t index) {
  const int64_t n = s.sizes[3], from = line(s, s.in[0], index), to = line(s, s.out, index);
  const float center = sum_of(s, s.in[0], from, 0, false) / n;
  const float spread = sum_of(s, s.in[0], from, center, true) / n;
  const __m512 factor = _mm512_set1_ps(1 / std::sqrt(spread + static_cast<float>(s.number)));
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = first(n - i);
    __m512 v = elements(s.in[0], from + i, 1, mask);
    v = _mm512_mul_ps(_mm512_sub_ps(v, _mm512_set1_ps(center)), factor);
    if (s.operands > 1) v = _mm512_mul_ps(v, elements(s.in[1], i, 1, mask));
    if (s.operands > 2) v = _mm512_add_ps(v, elements(s.in[2], i, 1, mask));
    put(s.out, to + i, 1, mask, v);
  }
}

// in: numbers, then the table (contiguous) with ``number`` rows
void gather(const Step& s, int64_t index) {
  const int64_t row = *reinterpret_cast<int64_t*>(at(s.in[0], line(s, s.in[0], index)));
  const bool is_there = row >= 0 && row < static_cast<int64_t>(s.number);
  for (int64_t i = 0; i < s.sizes[3]; i += 16) {
    const __mmask16 mask = first(s.sizes[3] - i);
    put(s.out, line(s, s.out, index) + i, 1, mask,
        is_there ? elements(s.in[1], row * s.sizes[3] + i, 1, mask)
                 : _mm512_set1_ps(std::numeric_limits<float>::quiet_NaN()));
  }
}

void (*lines_of(int32_t op))(const Step&, int64_t) {
  return op == MEAN ? mean : op == LAYER_NORM ? layer_norm : op == GATHER ? gather : elementwise;
}

}  // namespace

extern "C" {

void run_steps(const Step* steps, int64_t count) {
  for (const Step* s = steps; s < steps + count; s++) {
    if (s->op == LINEAR) {
      const Weight* w = static_cast<const Weight*>(s->call);
      linear(w, s->in[0].data, s->sizes[0], w->k, s->out.data, s->out.type);
    } else if (s->op == ROWS_OF) {
      rows_of(static_cast<const Weight*>(s->call), reinterpret_cast<int64_t*>(s->in[0].data),
              s->sizes[0], reinterpret_cast<float*>(s->out.data));
    } else if (s->op == ATTENTION) {
      attention(static_cast<const Attention*>(s->call));
    } else if (s->op == WRITE_CACHE) {
      write_cache(static_cast<const Copy*>(s->call));
    } else {
      const int64_t lines = s->sizes[0] * s->sizes[1] * s->sizes[2];
      const auto body = lines_of(s->op);
      auto some = [&](int64_t b, int64_t e) {
        for (int64_t i = b; i < e; i++) body(*s, i);
      };
      if (lines * s->sizes[3] < WORTH_SHARING) {
        some(0, lines);
      } else {
        std::lock_guard<std::mutex> lock(busy);
        team->run(lines, some);
      }
    }
  }
}

}  // extern "C"

// ---- drawing tokens --------------------------------------------------------------------------
//
// What engine/sampler.py defines, for rows where there is no doubt about it. Every token's score is
// its probability over its noise, and of those that the filters keep the best one wins. Here the
// logarithm in the noise is taken for those only that can win; and filters are asked about the
// winner only: it is kept if the tokens before it leave it a place, else it is out with all that
// are less likely, and what remains races again. Probabilities lack the factor that makes their
// sum 1, and the last bits may differ from torch's: where that could matter nothing is chosen.

extern "C" {
struct Draw {
  const float* logits;
  int64_t size;   // tokens
  uint64_t key;   // noise.py
  int64_t top_k;  // size: all of them
  double temperature, top_p, min_p;
};
}

namespace {

constexpr float NEVER = 1e-20f;     // times the likeliest: the luckiest noise does not make up for it
constexpr float EQUAL = 2e-6f;      // two that are nearer to each other may be in either order
constexpr float CLOSE = 1e-5f;      // scores that are nearer are not told apart
constexpr double SUM_ERROR = 1e-3;  // more than a sum in float32 may be off
constexpr double TINY = 1e-30;      // what is smaller, or its inverse, may not be a normal float
constexpr int64_t UNSURE = -1;
constexpr uint64_t GAMMA = 0x9E3779B97F4A7C15;
constexpr int64_t PART = 64;  // tokens

// SplitMix64
uint64_t mixed(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

__m512i mixed(__m512i x) {
  x = _mm512_xor_si512(x, _mm512_srli_epi64(x, 30));
  x = _mm512_mullo_epi64(x, _mm512_set1_epi64(0xBF58476D1CE4E5B9));
  x = _mm512_xor_si512(x, _mm512_srli_epi64(x, 27));
  x = _mm512_mullo_epi64(x, _mm512_set1_epi64(0x94D049BB133111EB));
  return _mm512_xor_si512(x, _mm512_srli_epi64(x, 31));
}

// 2^53 times less than the noise of eight tokens: 1 - u <= -log u.
__m256 least_noise(__m512i x) {
  const __m512i ones = _mm512_set1_epi64(-1);
  return _mm512_cvtepu64_ps(_mm512_srli_epi64(_mm512_xor_si512(mixed(x), ones), 11));
}

// The likeliest token, the first of equals; UNSURE in a row that has NaN or whose best is infinite.
int64_t likeliest(const float* logits, int64_t size) {
  __m512 most = _mm512_set1_ps(-INFINITY);
  __mmask16 broken = 0;
  for (int64_t i = 0; i < size; i += 16) {
    const __mmask16 mask = first(size - i);
    const __m512 x = load(logits + i, mask);
    broken |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    most = _mm512_mask_max_ps(most, mask, most, x);
  }
  const float best = _mm512_reduce_max_ps(most);
  if (broken || !std::isfinite(best)) return UNSURE;
  const __m512 wanted = _mm512_set1_ps(best);
  for (int64_t i = 0;; i += 16) {
    const __mmask16 mask = first(size - i);
    const int found = _mm512_mask_cmp_ps_mask(mask, load(logits + i, mask), wanted, _CMP_EQ_OQ);
    if (found) return i + __builtin_ctz(found);
  }
}

// One row: shares of its tokens (1 is the likeliest's, zeros up to a multiple of 16), and the draw.
struct Drawing {
  const Draw& d;
  float* shares;
  int64_t best;  // the likeliest
  double total = 0;

  void find_shares() {
    const __m512 top = _mm512_set1_ps(d.logits[best]);
    const __m512 temperature = _mm512_set1_ps(static_cast<float>(d.temperature));
    __m512d sum = _mm512_setzero_pd();
    for (int64_t i = 0; i < d.size; i += 16) {
      const __mmask16 mask = first(d.size - i);
      const __m512 x = _mm512_sub_ps(load(d.logits + i, mask), top);
      const __m512 e = _mm512_maskz_mov_ps(mask, exp16(_mm512_div_ps(x, temperature)));
      _mm512_storeu_ps(shares + i, e);
      sum = _mm512_add_pd(sum, _mm512_cvtps_pd(_mm512_castps512_ps256(e)));
      sum = _mm512_add_pd(sum, _mm512_cvtps_pd(_mm512_extractf32x8_ps(e, 1)));
    }
    total = _mm512_reduce_add_pd(sum);
  }

  double score(int64_t token) const {
    const double u = (static_cast<double>(mixed(d.key + token * GAMMA) >> 11) + .5) * 0x1p-53;
    return u < 1 ? shares[token] / -std::log(u) : INFINITY;  // no noise at all: not for us
  }

  // The winner among the tokens whose share is above the floor.
  int64_t race(float floor) const {
    double most = score(best), second = 0;
    int64_t winner = best;
    const __m512i step = _mm512_set1_epi64(16 * GAMMA), half = _mm512_set1_epi64(8 * GAMMA);
    const __m512i places = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
    __m512i x = _mm512_mullo_epi64(places, _mm512_set1_epi64(GAMMA));
    x = _mm512_add_epi64(x, _mm512_set1_epi64(d.key));
    const __m512 least = _mm512_set1_ps(floor);
    // a share that cannot be this often its least noise has lost
    __m512 bound = _mm512_set1_ps(static_cast<float>(most * (1 - 2 * CLOSE) * 0x1p-53));
    for (int64_t i = 0; i < d.size; i += 16, x = _mm512_add_epi64(x, step)) {
      const __m512 e = _mm512_loadu_ps(shares + i);
      const __mmask16 open = _mm512_cmp_ps_mask(e, least, _CMP_GT_OQ);
      if (!open) continue;
      const __m512 noise = _mm512_insertf32x8(_mm512_castps256_ps512(least_noise(x)),
                                              least_noise(_mm512_add_epi64(x, half)), 1);
      int able = _mm512_mask_cmp_ps_mask(open, e, _mm512_mul_ps(bound, noise), _CMP_GE_OQ);
      if (!able) continue;
      for (; able; able &= able - 1) {
        const int64_t token = i + __builtin_ctz(able);
        const double own = score(token);
        if (token == best) continue;
        second = std::max(second, std::min(own, most));
        if (own > most) most = own, winner = token;
      }
      bound = _mm512_set1_ps(static_cast<float>(most * (1 - 2 * CLOSE) * 0x1p-53));
    }
    return std::isfinite(most) && second < most * (1 - CLOSE) ? winner : UNSURE;
  }

  // The sum of the shares from ``least`` on, and how many they are.
  std::pair<double, int64_t> from(float least) const {
    const __m512 edge = _mm512_set1_ps(least);
    __m512d sum = _mm512_setzero_pd();
    int64_t count = 0;
    for (int64_t i = 0; i < d.size; i += 16) {
      const __m512 e = _mm512_loadu_ps(shares + i);
      const __mmask16 mask = _mm512_cmp_ps_mask(e, edge, _CMP_GE_OQ);
      if (!mask) continue;
      const __m512 part = _mm512_maskz_mov_ps(mask, e);
      sum = _mm512_add_pd(sum, _mm512_cvtps_pd(_mm512_castps512_ps256(part)));
      sum = _mm512_add_pd(sum, _mm512_cvtps_pd(_mm512_extractf32x8_ps(part, 1)));
      count += __builtin_popcount(mask);
    }
    return {_mm512_reduce_add_pd(sum), count};
  }

  // The k-th largest share, k < size.
  float largest(int64_t k) const {
    static thread_local std::vector<float> some;
    some.clear();
    for (int64_t i = 0; i < d.size; i += PART)
      some.push_back(*std::max_element(shares + i, shares + std::min(i + PART, d.size)));
    float least = 0;  // as many are as large as this
    if (k < static_cast<int64_t>(some.size())) {
      std::nth_element(some.begin(), some.begin() + k - 1, some.end(), std::greater<float>());
      least = some[k - 1];
    }
    some.clear();
    for (int64_t i = 0; i < d.size; i++)
      if (shares[i] >= least) some.push_back(shares[i]);
    std::nth_element(some.begin(), some.begin() + k - 1, some.end(), std::greater<float>());
    return some[k - 1];
  }

  int64_t draw() const {
    double room = total;  // what a nucleus is a part of
    float floor = NEVER;
    const float last = d.top_k < d.size ? largest(d.top_k) : 0;
    if (last > NEVER) {
      const auto [above, count] = from(last * (1 + EQUAL));
      if (count != d.top_k - 1 || from(last * (1 - EQUAL)).second != d.top_k) return UNSURE;
      room = above + last;
      floor = last * (1 - EQUAL);
    }
    for (;;) {
      const int64_t winner = race(floor);
      if (winner == UNSURE) return UNSURE;
      const float share = shares[winner];
      if (std::abs(share - d.min_p) <= CLOSE * d.min_p && d.min_p > 0) return UNSURE;
      bool is_kept = share >= d.min_p;
      if (is_kept && d.top_p < 1) {
        const double most = from(share * (1 - EQUAL)).first - share;
        const double least = from(share * (1 + EQUAL)).first;
        is_kept = most <= 0 || most < d.top_p * (1 - SUM_ERROR) * room;
        if (!is_kept && least <= d.top_p * (1 + SUM_ERROR) * room) return UNSURE;
      }
      if (is_kept) return winner;
      floor = share;
    }
  }
};

int64_t drawn(const Draw& d) {
  const int64_t best = likeliest(d.logits, d.size);
  if (d.temperature == 0 || best == UNSURE) return best;
  if (!(d.temperature > TINY && d.temperature < 1 / TINY)) return UNSURE;
  static thread_local std::vector<float> shares;
  shares.resize((d.size + 15) / 16 * 16);
  Drawing row{d, shares.data(), best};
  row.find_shares();
  return row.draw();
}

}  // namespace

extern "C" {

// A token for each row, or UNSURE.
void draw(const Draw* rows, int64_t count, int64_t* tokens) {
  std::lock_guard<std::mutex> lock(busy);
  team->run(count, [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; i++) tokens[i] = drawn(rows[i]);
  });
}

}  // extern "C"
