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

// A polynomial near 0 (Cephes), where the other form would lose digits.
__m512 tanh16(__m512 x) {
  const __m512 size = _mm512_abs_ps(x), z = _mm512_mul_ps(x, x), one = _mm512_set1_ps(1);
  __m512 p = _mm512_set1_ps(-5.70498872745e-3f);
  for (float c : {2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f, -3.33332819422e-1f})
    p = _mm512_fmadd_ps(p, z, _mm512_set1_ps(c));
  const __m512 near = _mm512_fmadd_ps(_mm512_mul_ps(p, z), x, x);
  const __m512 e = exp16(_mm512_add_ps(size, size));
  const __m512 part = _mm512_div_ps(one, _mm512_add_ps(e, one));
  const __m512 far = _mm512_fnmadd_ps(_mm512_set1_ps(2), part, one);
  const __mmask16 is_near = _mm512_cmp_ps_mask(size, _mm512_set1_ps(0.625f), _CMP_LT_OQ);
  const __m512 sign = _mm512_and_ps(x, _mm512_set1_ps(-0.f));
  return _mm512_mask_mov_ps(_mm512_or_ps(far, sign), is_near, near);
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

int64_t fetches(const Weight& w) {  // of several tiles, each: with how many steps it fetches
  return w.type == I4 ? groups(w) * (GROUP_STEPS / 2 + 1) : steps(w) + in_groups(w) * groups(w);
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

// What is fetched while a panel is used, a bit with each step along k.
enum Fetch { NOTHING, OWN, NEXT };
struct Ahead {
  const char* next;  // panel, or a part of it
  int64_t stride;
};

// OWN: a little ahead in the same panel, into the second cache, or into the first where there is no
// time to fetch it from there. NEXT: into the second cache, slowly.
template <Fetch F, int R>
void fetch(const uint8_t* w, Ahead& ahead, bool whole = true) {
  const char* p = reinterpret_cast<const char*>(w + AHEAD);
  if (F == OWN) _mm_prefetch(p, R > 6 ? _MM_HINT_T0 : _MM_HINT_T1);
  if (F == OWN && whole) _mm_prefetch(p + 64, R > 6 ? _MM_HINT_T0 : _MM_HINT_T1);
  if (F == NEXT) _mm_prefetch(ahead.next, _MM_HINT_T1);
  if (F == NEXT) ahead.next += ahead.stride;
}

// Adds the products of R rows with one panel to their sums.
template <class Dot, Fetch F, int R>
inline void dense_sums(const uint8_t* w, Ahead ahead, const int32_t* x, int64_t stride, int64_t n,
                       Sums<R>& sums) {
#pragma GCC unroll 4
  for (int64_t i = 0; i < n; i++, w += 128) {
    const __m512i w0 = _mm512_load_si512(w), w1 = _mm512_load_si512(w + 64);
    fetch<F, R>(w, ahead);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      sums[r][0] = Dot::add(sums[r][0], w0, x[r * stride + i]);
      sums[r][1] = Dot::add(sums[r][1], w1, x[r * stride + i]);
    }
  }
}

// The scale of a group of a row, and minus 128 times the sum of its numbers: weights are stored
// plus 128, because the instruction wants one side unsigned.
struct GroupInfo {
  float scale;
  int32_t offset;
};

template <Fetch F, int R>
inline void grouped_sums(const uint8_t* w, Ahead ahead, const int32_t* x, const GroupInfo* info,
                         int64_t n, Sums<R>& sums) {
  for (int64_t g = 0; g < n; g++) {
    __m512i dots[R][2];
    for (int r = 0; r < R; r++) dots[r][0] = dots[r][1] = _mm512_set1_epi32(info[r * n + g].offset);
#pragma GCC unroll 4
    for (int i = 0; i < GROUP_STEPS; i++, w += 128) {
      const __m512i w0 = _mm512_load_si512(w), w1 = _mm512_load_si512(w + 64);
      fetch<F, R>(w, ahead);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        const __m512i b = _mm512_set1_epi32(x[r * n * GROUP_STEPS + g * GROUP_STEPS + i]);
        dots[r][0] = _mm512_dpbusd_epi32(dots[r][0], w0, b);
        dots[r][1] = _mm512_dpbusd_epi32(dots[r][1], w1, b);
      }
    }
    if (F == NEXT) fetch<F, R>(w, ahead);
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
template <Fetch F, int R>
inline void nibble_sums(const uint8_t* w, Ahead ahead, const int32_t* x, const NibbleInfo* info,
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
      if (F == OWN || i % 2) fetch<F, R>(w, ahead, false);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        const __m512i b = _mm512_set1_epi32(x[r * n * GROUP_STEPS + g * GROUP_STEPS + i]);
        dots[r][0] = _mm512_dpbusd_epi32(dots[r][0], low, b);
        dots[r][1] = _mm512_dpbusd_epi32(dots[r][1], both, b);
      }
    }
    fetch<F, R>(w, ahead);
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

template <Fetch F, int R>
inline void sums_of(const Product& job, const uint8_t* panel, int64_t m, Ahead ahead,
                    Sums<R>& sums) {
  const Weight& w = job.w;
  const int64_t n = steps(w);
  const int32_t* x = job.x + m * n;
  if (w.type == I8) {
    grouped_sums<F, R>(panel, ahead, x, job.info + m * groups(w), groups(w), sums);
  } else if (w.type == I4) {
    const auto* info = reinterpret_cast<const NibbleInfo*>(job.info + m * groups(w));
    nibble_sums<F, R>(panel, ahead, x, info, groups(w), sums);
  } else if (w.type == BF16) {
    dense_sums<DotBF16, F, R>(panel, ahead, x, n, n, sums);
  } else {
    dense_sums<DotF32, F, R>(panel, ahead, x, n, n, sums);
  }
}

// R rows from m on with panel p, the nth of so many tiles. A single one fetches its panel a little
// ahead of its use. Of several each fetches its part of the next panel: so memory is busy all the
// time that the processor is, and never more than it can bear.
template <int R>
void tile(const Product& job, int64_t p, int64_t m, int64_t nth, int64_t tiles) {
  const Weight& w = job.w;
  const uint8_t* panel = w.data + p * panel_bytes(w);
  Sums<R> sums;
  for (auto& sum : sums) sum[0] = sum[1] = _mm512_setzero_ps();
  if (tiles == 1) {
    sums_of<OWN, R>(job, panel, m, {}, sums);
  } else {
    const int64_t part = (panel_bytes(w) + tiles - 1) / tiles;
    const char* next = reinterpret_cast<const char*>(panel + panel_bytes(w) + nth * part);
    sums_of<NEXT, R>(job, panel, m, {next, (part + fetches(w) - 1) / fetches(w)}, sums);
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
using Tile = void (*)(const Product&, int64_t, int64_t, int64_t, int64_t);
template <size_t... I>
constexpr std::array<Tile, sizeof...(I)> make_tiles(std::index_sequence<I...>) {
  return {tile<I + 1>...};
}
constexpr auto TILES = make_tiles(std::make_index_sequence<MOST>{});

// One panel with all rows; the panel stays in the second cache meanwhile.
void all_rows(const Product& job, int64_t p, int64_t rows) {
  const int64_t tiles = rows <= MOST ? std::min<int64_t>(1, rows) : (rows + ROWS - 1) / ROWS;
  for (int64_t nth = 0; nth < tiles; nth++) {
    const int64_t m = rows * nth / tiles, r = rows * (nth + 1) / tiles - m;
    TILES[r - 1](job, p, m, nth, tiles);
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

constexpr int64_t BLOCK = 64, MAX_SIZE = 256;
constexpr int64_t SHARE = 48;  // queries, times heads, that go through a row's keys together
constexpr int64_t PAD = 16;    // so that neighbours do not meet in the same lines of the cache

// What attention does with numbers of a type: keys and values as panels like those of weights,
// queries and shares as their rows. With BF16 both are rounded to it.
template <class T>
struct Kind;
template <>
struct Kind<float> {
  using Dot = DotF32;
  static constexpr int64_t STEP = 1;  // numbers in a lane
  static __m512i row(__m512 low, __m512) { return _mm512_castps_si512(low); }
  static __m512 rounded(__m512 v) { return v; }
  static __m512i lanes(const float* p, int64_t n) {
    return _mm512_castps_si512(load(p, first(n)));
  }
  static void panel(__m512i low, __m512i high, __m512i* to) {
    to[0] = low, to[1] = high;
  }
  static void in_order(__m512&, __m512&) {}
  static bool finite(__m512i v) {
    const __m512i ones = _mm512_set1_epi32(0x7f800000);
    return !_mm512_cmpeq_epi32_mask(_mm512_and_si512(v, ones), ones);
  }
};
template <>
struct Kind<uint16_t> {
  using Dot = DotBF16;
  static constexpr int64_t STEP = 2;
  static __m512i row(__m512 low, __m512 high) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(narrow(low)), narrow(high), 1);
  }
  static __m512 rounded(__m512 v) { return wide(narrow(v)); }
  static __m512i lanes(const uint16_t* p, int64_t n) {
    const __mmask32 mask = n >= 32 ? ~0u : n <= 0 ? 0 : (1u << n) - 1;
    return _mm512_maskz_loadu_epi16(mask, p);
  }
  // Two keys' values in pairs. They come in an order of their own, which ``in_order`` undoes.
  static void panel(__m512i one, __m512i two, __m512i* to) {
    to[0] = _mm512_unpacklo_epi16(one, two), to[1] = _mm512_unpackhi_epi16(one, two);
  }
  static void in_order(__m512& a, __m512& b) {
    const __m512 low = _mm512_shuffle_f32x4(a, b, 0x44), high = _mm512_shuffle_f32x4(a, b, 0xee);
    a = _mm512_shuffle_f32x4(low, low, 0xd8), b = _mm512_shuffle_f32x4(high, high, 0xd8);
  }
  static bool finite(__m512i v) {
    const __m512i ones = _mm512_set1_epi16(0x7f80);
    return !_mm512_cmpeq_epi16_mask(_mm512_and_si512(v, ones), ones);
  }
};

struct Query {
  int64_t begin, end;  // the keys that it sees
  float peak, total, faded;
};

// What one thread works with.
struct Desk {
  Query query[SHARE];
  alignas(64) int32_t q[SHARE][MAX_SIZE + PAD];
  alignas(64) float sum[SHARE][MAX_SIZE + PAD];
  alignas(64) float scores[SHARE][BLOCK + PAD];  // of a block
  alignas(64) int32_t parts[SHARE][BLOCK + PAD];
  alignas(64) __m512i keys[BLOCK / PANEL][MAX_SIZE][2];
  alignas(64) __m512i values[MAX_SIZE / PANEL][BLOCK][2];
};

// Lane i of vector j becomes lane j of vector i.
inline void transpose(__m512i (&v)[16]) {
  __m512i w[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    const __m512i a = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    const __m512i b = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    const __m512i c = _mm512_unpacklo_epi32(v[i + 2], v[i + 3]);
    const __m512i d = _mm512_unpackhi_epi32(v[i + 2], v[i + 3]);
    w[i] = _mm512_unpacklo_epi64(a, c), w[i + 1] = _mm512_unpackhi_epi64(a, c);
    w[i + 2] = _mm512_unpacklo_epi64(b, d), w[i + 3] = _mm512_unpackhi_epi64(b, d);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const __m512i a = _mm512_shuffle_i32x4(w[i], w[i + 4], 0x88);
    const __m512i b = _mm512_shuffle_i32x4(w[i], w[i + 4], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(w[i + 8], w[i + 12], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(w[i + 8], w[i + 12], 0xdd);
    v[i] = _mm512_shuffle_i32x4(a, c, 0x88), v[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd), v[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
}

// What is fetched meanwhile, to be there when it is its turn: the keys that come BLOCK keys later
// and their values, of this share and then of the next; all of them, and as evenly as others are
// used, since few queries wait for little but memory. By a macro: gcc takes a function that does
// nothing else for one that does nothing.
struct NextKeys {
  struct Side {
    const char *own, *next;
    int64_t stride;
  };
  Side keys, values;
  int64_t own, count, bytes;  // how many are this share's; all; bytes of each
};
#define FETCH(side, from, to)                                                              \
  for (int64_t i = from, last = std::min<int64_t>(to, ahead.count); i < last; i++) {       \
    const char* p = i < ahead.own ? ahead.side.own + i * ahead.side.stride                 \
                                  : ahead.side.next + (i - ahead.own) * ahead.side.stride; \
    for (int64_t b = 0; b < ahead.bytes; b += 64) _mm_prefetch(p + b, _MM_HINT_T1);        \
  }

// The keys begin..end of the block that starts at key 0 here, as panels; none are read beyond.
template <class T>
void lay_keys(const Attention& a, const T* keys, int64_t begin, int64_t end, const NextKeys& ahead,
              Desk& desk) {
  constexpr int64_t LANES = 16 * Kind<T>::STEP;
  const int64_t from = begin / 16 * 16, to = (end + 31) / 32 * 32;
  const int64_t some = (ahead.count * 16 + to - from - 1) / (to - from);
  for (int64_t k = from, fetched = 0; k < to; k += 16, fetched += some) {
    FETCH(keys, fetched, fetched + some);
    for (int64_t j = 0; j < a.size; j += LANES) {
      __m512i v[16];
      if (k >= begin && k + 16 <= end && j + LANES <= a.size) {
#pragma GCC unroll 16
        for (int64_t i = 0; i < 16; i++)
          v[i] = _mm512_loadu_si512(keys + (k + i) * a.k_strides[2] + j);
      } else {
        for (int64_t i = 0; i < 16; i++) {
          const bool is_there = k + i >= begin && k + i < end;
          v[i] = is_there ? Kind<T>::lanes(keys + (k + i) * a.k_strides[2] + j, a.size - j)
                          : _mm512_setzero_si512();
        }
      }
      transpose(v);
      __m512i (*to)[2] = desk.keys[k / PANEL] + j / Kind<T>::STEP;
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; i++) to[i][k / 16 % 2] = v[i];
    }
  }
}

// The same with values; whether all of them are finite, if that is of interest.
template <class T>
bool lay_values(const Attention& a, const T* values, int64_t begin, int64_t end, bool ask,
                const NextKeys& ahead, Desk& desk) {
  constexpr int64_t STEP = Kind<T>::STEP, LANES = 16 * STEP;
  bool finite = true;
  auto at = [&](int64_t k, int64_t j) {
    return k >= begin && k < end ? Kind<T>::lanes(values + k * a.v_strides[2] + j, a.size - j)
                                 : _mm512_setzero_si512();
  };
  const int64_t some = (ahead.count * STEP + end - 1) / end;
  for (int64_t k = 0, fetched = 0; k < end; k += STEP, fetched += some) {
    FETCH(values, fetched, fetched + some);
    int64_t j = 0;
    const T* p = values + k * a.v_strides[2];
    for (; k >= begin && k + STEP <= end && j + PANEL <= a.size; j += PANEL) {  // nearly always
      const __m512i low = _mm512_loadu_si512(p + j);
      const __m512i other = _mm512_loadu_si512(p + j + (STEP == 2 ? a.v_strides[2] : LANES));
      if (ask) finite &= Kind<T>::finite(low) && Kind<T>::finite(other);
      Kind<T>::panel(low, other, desk.values[j / PANEL][k / STEP]);
    }
    for (; j < a.size; j += PANEL) {
      const __m512i low = at(k, j), other = STEP == 2 ? at(k + 1, j) : at(k, j + LANES);
      if (ask) finite &= Kind<T>::finite(low) && Kind<T>::finite(other);
      Kind<T>::panel(low, other, desk.values[j / PANEL][k / STEP]);
    }
  }
  return finite;
}

__m512 capped(__m512 scores, float cap) {
  return _mm512_mul_ps(_mm512_set1_ps(cap), tanh16(_mm512_mul_ps(scores, _mm512_set1_ps(1 / cap))));
}

template <class T, int R>
void score(const Attention& a, Desk& desk, int64_t m, int64_t end) {
  const int64_t n = (a.size + Kind<T>::STEP - 1) / Kind<T>::STEP;
  for (int64_t p = 0; p * PANEL < end; p++) {
    Sums<R> sums;
    for (auto& sum : sums) sum[0] = sum[1] = _mm512_setzero_ps();
    dense_sums<typename Kind<T>::Dot, NOTHING, R>(
        reinterpret_cast<const uint8_t*>(desk.keys[p]), {}, desk.q[m], MAX_SIZE + PAD, n, sums);
    for (int r = 0; r < R; r++)
      for (int half = 0; half < 2; half++) {
        const __m512 scores = _mm512_mul_ps(sums[r][half], _mm512_set1_ps(a.scale));
        _mm512_store_ps(desk.scores[m + r] + p * PANEL + 16 * half,
                        a.softcap ? capped(scores, a.softcap) : scores);
      }
  }
}

// From the scores of a block to the shares of its keys in the result, as far as they are known;
// ``block``: the first key.
template <class T>
void share_out(Desk& desk, int64_t m, int64_t block) {
  Query& query = desk.query[m];
  const int64_t begin = query.begin - block, end = query.end - block;
  query.faded = 1;
  if (begin >= BLOCK || end <= 0) {
    std::memset(desk.parts[m], 0, BLOCK / Kind<T>::STEP * 4);
    return;
  }
  __m512 peak = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  for (int64_t i = 0; i < BLOCK; i += 16) {
    const __mmask16 mask = first(end - i) & ~first(begin - i);
    peak = _mm512_mask_max_ps(peak, mask, peak, _mm512_load_ps(desk.scores[m] + i));
  }
  const float highest = std::max(query.peak, _mm512_reduce_max_ps(peak));
  query.faded = _mm512_cvtss_f32(exp16(_mm512_set1_ps(query.peak - highest)));
  query.peak = highest;
  __m512 total = _mm512_setzero_ps(), parts[2];
  for (int64_t i = 0; i < BLOCK; i += 16) {
    const __mmask16 mask = first(end - i) & ~first(begin - i);
    __m512& part = parts[i / 16 % Kind<T>::STEP];
    part = _mm512_sub_ps(_mm512_load_ps(desk.scores[m] + i), _mm512_set1_ps(highest));
    part = mask ? _mm512_maskz_mov_ps(mask, exp16(part)) : _mm512_setzero_ps();
    total = _mm512_add_ps(total, Kind<T>::rounded(part));
    if ((i / 16 + 1) % Kind<T>::STEP == 0)
      _mm512_store_si512(desk.parts[m] + (i + 16) / Kind<T>::STEP - 16,
                         Kind<T>::row(parts[0], parts[1]));
  }
  query.total = query.total * query.faded + _mm512_reduce_add_ps(total);
}

template <class T, int R>
void gather_values(const Attention& a, Desk& desk, int64_t m, int64_t end) {
  const int64_t n = (end + Kind<T>::STEP - 1) / Kind<T>::STEP;
  for (int64_t p = 0; p * PANEL < a.size; p++) {
    Sums<R> sums;
    for (int r = 0; r < R; r++)
      for (int half = 0; half < 2; half++)
        sums[r][half] = _mm512_mul_ps(_mm512_load_ps(desk.sum[m + r] + p * PANEL + 16 * half),
                                      _mm512_set1_ps(desk.query[m + r].faded));
    dense_sums<typename Kind<T>::Dot, NOTHING, R>(
        reinterpret_cast<const uint8_t*>(desk.values[p]), {}, desk.parts[m], BLOCK + PAD, n, sums);
    for (int r = 0; r < R; r++)
      for (int half = 0; half < 2; half++)
        _mm512_store_ps(desk.sum[m + r] + p * PANEL + 16 * half, sums[r][half]);
  }
}

using See = void (*)(const Attention&, Desk&, int64_t, int64_t);
template <class T, bool SCORE, size_t... I>
constexpr std::array<See, sizeof...(I)> make_sees(std::index_sequence<I...>) {
  return {(SCORE ? score<T, I + 1> : gather_values<T, I + 1>)...};
}
template <class T, bool SCORE>
constexpr auto SEES = make_sees<T, SCORE>(std::make_index_sequence<6>{});

// f(rows of a tile, first row) for rows begin..end.
template <class F>
void tiles_of(int64_t begin, int64_t end, const F& f) {
  for (int64_t m = begin; m < end;) {
    const int64_t left = end - m, r = left <= 6 ? left : left < 12 ? (left + 1) / 2 : 6;
    f(r, m);
    m += r;
  }
}

// All rows see a block of keys. A value that is not finite would reach, times zero, those too that
// do not see it; so they get their values one by one if there is such a one.
template <class T>
void see_block(const Attention& a, Desk& desk, int64_t count, const T* keys, const T* values,
               int64_t block, const NextKeys& ahead) {
  int64_t rows = count, skipped = 0;
  while (skipped < count && desk.query[skipped].end <= block) skipped++;
  while (rows > skipped && desk.query[rows - 1].begin >= block + BLOCK) rows--;
  if (skipped == rows) return;
  keys += block * a.k_strides[2], values += block * a.v_strides[2];
  const int64_t begin = std::max<int64_t>(0, desk.query[skipped].begin - block);
  const int64_t end = std::min(BLOCK, desk.query[rows - 1].end - block);
  auto end_of = [&](int64_t m) { return std::min(BLOCK, desk.query[m].end - block); };
  lay_keys(a, keys, begin, end, ahead, desk);
  const bool alike = desk.query[skipped].end == desk.query[rows - 1].end;
  const bool together = lay_values(a, values, begin, end, !alike, ahead, desk);
  tiles_of(skipped, rows, [&](int64_t r, int64_t m) {
    SEES<T, true>[r - 1](a, desk, m, end_of(m + r - 1));
    for (int64_t i = m; i < m + r; i++) share_out<T>(desk, i, block);
    if (together) SEES<T, false>[r - 1](a, desk, m, end_of(m + r - 1));
  });
  for (int64_t m = skipped; m < rows && !together; m++) {
    if (desk.query[m].begin >= block + BLOCK) continue;
    const int64_t own = std::max<int64_t>(0, desk.query[m].begin - block);
    lay_values(a, values, own, end_of(m), false, NextKeys(), desk);
    SEES<T, false>[0](a, desk, m, end_of(m));
  }
}

template <class T>
void finish(const Attention& a, const Desk& desk, int64_t m, int64_t head, int64_t to) {
  const Query& query = desk.query[m];
  float total = query.total, faded = 1;
  if (a.sinks) {
    const float highest = std::max(query.peak, a.sinks[head]);
    faded = std::exp(query.peak - highest);
    total = total * faded + std::exp(a.sinks[head] - highest);
  }
  const __m512 factor = _mm512_set1_ps(faded / total);
  for (int64_t j = 0; j < a.size; j += PANEL) {
    __m512 low = _mm512_load_ps(desk.sum[m] + j), high = _mm512_load_ps(desk.sum[m] + j + 16);
    Kind<T>::in_order(low, high);
    store(a.out, a.q_type, to * a.size + j, first(a.size - j), _mm512_mul_ps(low, factor));
    if (j + 16 < a.size)
      store(a.out, a.q_type, to * a.size + j + 16, first(a.size - j - 16),
            _mm512_mul_ps(high, factor));
  }
}

// A few queries of one row with the heads that share its keys and values.
struct Share {
  int64_t row, kv_head, head, heads, query, queries;
};

template <class T>
void attend(const Attention& a, const Share& s, const Share& next, Desk& desk) {
  auto keys_of = [&](const Share& share) {
    return static_cast<const T*>(a.k) + share.row * a.k_strides[0] +
           share.kv_head * a.k_strides[1];
  };
  auto values_of = [&](const Share& share) {
    return static_cast<const T*>(a.v) + share.row * a.v_strides[0] +
           share.kv_head * a.v_strides[1];
  };
  auto begin_of = [&](int64_t end) { return a.window ? std::max<int64_t>(0, end - a.window) : 0; };
  const int64_t count = s.heads * s.queries;
  auto head_of = [&](int64_t i) { return s.head + i % s.heads; };
  auto query_of = [&](int64_t i) { return s.query + i / s.heads; };
  for (int64_t i = 0; i < count; i++) {
    Query& query = desk.query[i];
    query.end = a.starts[s.row] + query_of(i) + 1;
    query.begin = begin_of(query.end);
    query.peak = -std::numeric_limits<float>::max(), query.total = 0;
    const int64_t at = s.row * a.q_strides[0] + head_of(i) * a.q_strides[1] +
                       query_of(i) * a.q_strides[2];
    constexpr int64_t STEP = Kind<T>::STEP;
    for (int64_t j = 0; j < a.size; j += 16 * STEP)
      _mm512_store_si512(desk.q[i] + j / STEP,
                         Kind<T>::row(load(a.q, a.q_type, at + j, first(a.size - j)),
                                      load(a.q, a.q_type, at + j + 16, first(a.size - j - 16))));
    for (int64_t j = 0; j < a.size; j += PANEL)
      for (int64_t half : {0, 16}) _mm512_store_ps(desk.sum[i] + j + half, _mm512_setzero_ps());
  }
  const int64_t end = desk.query[count - 1].end;
  const int64_t next_end = a.starts[next.row] + next.query + 1;
  const int64_t next_begin = begin_of(next_end) / BLOCK * BLOCK;
  const int64_t begin = desk.query[0].begin / BLOCK * BLOCK;
  for (int64_t at = begin; at < end; at += BLOCK) {
    const int64_t own = std::clamp<int64_t>(end - at - BLOCK, 0, BLOCK);
    const int64_t known = at == begin ? 0 : std::max<int64_t>(0, at + BLOCK - end);
    const int64_t wanted = std::min(at + 2 * BLOCK - end, next_end - next_begin);
    auto side = [&](const T* mine, const T* others, int64_t stride) {
      return NextKeys::Side{reinterpret_cast<const char*>(mine + (at + BLOCK) * stride),
                            reinterpret_cast<const char*>(others + (next_begin + known) * stride),
                            stride * static_cast<int64_t>(sizeof(T))};
    };
    const NextKeys ahead{side(keys_of(s), keys_of(next), a.k_strides[2]),
                         side(values_of(s), values_of(next), a.v_strides[2]),
                         own, own + std::max<int64_t>(0, wanted - known),
                         a.size * static_cast<int64_t>(sizeof(T))};
    see_block<T>(a, desk, count, keys_of(s), values_of(s), at, ahead);
  }
  for (int64_t i = 0; i < count; i++)
    finish<T>(a, desk, i, head_of(i), (s.row * a.queries + query_of(i)) * a.heads + head_of(i));
}

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
void lanes_of(const Weight& w, const T* from, int64_t row, int32_t* lanes) {
  if (w.type != I8) return prepare(w, from, lanes);
  for (int64_t g = 0; g < groups(w); g++) {
    float x[GROUP];
    for (int i = 0; i < GROUP; i += 16)
      store(x + i, 0xffff, load(from + g * GROUP + i, first(w.k - g * GROUP - i)));
    pack_group(w, x, row, g, reinterpret_cast<int8_t*>(lanes) + g * GROUP);
  }
}

// Sixteen rows together where they can be: a step of theirs is a line of the panel.
template <class T>
void pack_rows(const Weight& w, const T* from, int64_t row, int64_t end) {
  const int64_t n = steps(w);
  std::vector<int32_t> lanes(16 * n);
  for (int64_t count; row < end; row += count, from += count * w.k) {
    count = row % 16 == 0 && end - row >= 16 ? 16 : 1;
    for (int64_t r = 0; r < count; r++) lanes_of(w, from + r * w.k, row + r, &lanes[r * n]);
    int32_t* panel = reinterpret_cast<int32_t*>(panel_of(w, row));
    for (int64_t i = 0; count == 1 && i < n; i++) panel[cell(w, row, i)] = lanes[i];
    for (int64_t i = 0; count == 16 && i < n; i += 16) {
      __m512i v[16];
      for (int r = 0; r < 16; r++) v[r] = _mm512_maskz_loadu_epi32(first(n - i), &lanes[r * n + i]);
      transpose(v);
      for (int64_t s = i; s < std::min(i + 16, n); s++)
        _mm512_storeu_si512(panel + cell(w, row, s), v[s - i]);
    }
  }
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

// Numbers that were made of four bits before are found by how many steps their range has. Others:
// from the whole range of each group on, narrower and wider ones, each as the line nearest to them.
Nibbles fitted(const __m512 (&x)[GROUP]) {
  __m512 low = x[0], high = x[0], square = _mm512_setzero_ps();
  for (const __m512& v : x) {
    low = _mm512_min_ps(low, v), high = _mm512_max_ps(high, v);
    square = _mm512_fmadd_ps(v, v, square);
  }
  const __m512 range = _mm512_sub_ps(high, low);
  Nibbles best{low, low, _mm512_set1_ps(std::numeric_limits<float>::infinity())};
  const __m512 nothing = _mm512_mul_ps(square, _mm512_set1_ps(1e-7f));
  for (float levels = 15; levels >= 8; levels--) {
    try_out(x, _mm512_div_ps(range, _mm512_set1_ps(levels)), low, best);
    if (_mm512_cmp_ps_mask(best.error, nothing, _CMP_LE_OQ) == 0xffff) return best;
  }
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
  team->run((row + count - 1) / PANEL - row / PANEL + 1, [&](int64_t b, int64_t e) {
    const int64_t begin = std::max(row, (row / PANEL + b) * PANEL);
    const int64_t end = std::min(row + count, (row / PANEL + e) * PANEL);
    const int64_t at = (begin - row) * w->k;
    if (type == F32) {
      pack_rows(*w, static_cast<const float*>(from) + at, begin, end);
    } else {
      pack_rows(*w, static_cast<const uint16_t*>(from) + at, begin, end);
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
  const int64_t together = std::min(SHARE, a.heads / a.kv_heads);
  // the heads of a group stay together, so that keys are fetched once for them, unless they are
  // all that there is to do
  const bool split = a.rows * a.kv_heads * a.queries < team->size();
  int64_t heads = split ? 1 : together;
  while (a.heads / a.kv_heads % heads) heads--;
  const int64_t queries = std::max<int64_t>(1, SHARE / heads);
  const int64_t tiles = (a.queries + queries - 1) / queries;
  const int64_t per_row = a.heads / heads * tiles;
  const auto attend_type = a.kv_type == F32 ? attend<float> : attend<uint16_t>;
  auto share_of = [&](int64_t i) {
    // tiles of late queries see more keys: neighbours are an early and a late one
    const int64_t nth = i % tiles, tile = nth % 2 ? tiles - 1 - nth / 2 : nth / 2;
    const int64_t head = i % per_row / tiles * heads, query = tile * queries;
    return Share{i / per_row, head / (a.heads / a.kv_heads), head, heads, query,
                 std::min(queries, a.queries - query)};
  };
  team->run(a.rows * per_row, [&](int64_t b, int64_t e) {
    static thread_local std::unique_ptr<Desk> desk(new Desk);
    for (int64_t i = b; i < e; i++)
      attend_type(a, share_of(i), share_of(std::min(i + 1, a.rows * per_row - 1)), *desk);
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

}  // extern "C"

namespace {

void write_some(const Copy& c, int64_t row, int64_t rows, int64_t query, int64_t queries) {
  for (; row < rows; row++)
    for (int64_t head = 0; head < c.heads; head++)
      for (int64_t t = query; t < queries; t++) {
        const int64_t a =
            row * c.from_strides[0] + head * c.from_strides[1] + t * c.from_strides[2];
        const int64_t b = row * c.to_strides[0] + head * c.to_strides[1] +
                          (c.starts[row] + t) * c.to_strides[2];
        for (int64_t j = 0; j < c.size; j += 16) {
          const __mmask16 mask = first(c.size - j);
          store(c.to, c.to_type, b + j, mask, load(c.from, c.from_type, a + j, mask));
        }
      }
}

}  // namespace

extern "C" {

// New keys or values into their rows of the cache.
void write_cache(const Copy* call) {
  std::lock_guard<std::mutex> lock(busy);
  write_some(*call, 0, call->rows, 0, call->queries);
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
  // With how many steps, this one the first, it is done token by token: sizes[0] counts tokens, and
  // what a step makes of one is read by the others for the same one only.
  int64_t together;
};

}  // extern "C"

namespace {

constexpr int32_t I64 = 3;
constexpr int64_t WORTH_SHARING = 16384;  // numbers that are computed
constexpr int64_t AT_ONCE = 4096;         // numbers that a step makes before it is the next one's turn

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

// x times the share of a normal distribution below x. The smaller of the two shares is half of
// erfc, which is within 2e-7 of this (Abramowitz and Stegun, 7.1.26).
__m512 gelu(__m512 x) {
  const __m512 one = _mm512_set1_ps(1);
  const __m512 z = _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(0.70710678f));
  const __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(z, _mm512_set1_ps(0.3275911f), one));
  __m512 p = _mm512_set1_ps(1.061405429f);
  for (float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f, 0.f})
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(c));
  const __m512 e = exp16(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_mul_ps(z, z)));
  const __m512 tail = _mm512_mul_ps(_mm512_mul_ps(p, _mm512_set1_ps(.5f)), e);
  const __mmask16 is_above = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GE_OQ);
  return _mm512_mul_ps(x, _mm512_mask_sub_ps(tail, is_above, one, tail));
}

__m512 gelu_tanh(__m512 x) {  // x * sigmoid(2u): tanh(u) = 2 sigmoid(2u) - 1
  const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
  const __m512 u = _mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), x);
  return _mm512_mul_ps(x, sigmoid(_mm512_mul_ps(u, _mm512_set1_ps(1.5957691216f))));
}

inline __m512 apply(int32_t op, __m512 a, __m512 b, float number) {
  switch (op) {
    case ADD: return _mm512_fmadd_ps(b, _mm512_set1_ps(number), a);
    case SUB: return _mm512_fnmadd_ps(b, _mm512_set1_ps(number), a);
    case MUL: return _mm512_mul_ps(a, b);
    case DIV: return _mm512_div_ps(a, b);
    case NEG: return _mm512_sub_ps(_mm512_set1_ps(-0.f), a);
    case CUBE: return _mm512_mul_ps(_mm512_mul_ps(a, a), a);
    case RSQRT: return _mm512_div_ps(_mm512_set1_ps(1), _mm512_sqrt_ps(a));
    case SQRT: return _mm512_sqrt_ps(a);
    case EXP: return exp16(a);
    case TANH: return tanh16(a);
    case SILU: return _mm512_mul_ps(a, sigmoid(a));
    case SIGMOID: return sigmoid(a);
    case GELU: return gelu(a);
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

// Lines of 16 floats after the other, or numbers of any kind and place.
template <int OP>
void elementwise(const Step& s, int64_t begin, int64_t end) {
  const int64_t n = s.sizes[3], lines = s.sizes[1] * s.sizes[2];
  const bool has_two = s.operands > 1;
  const int64_t steps[] = {s.out.strides[3], s.in[0].strides[3], has_two ? s.in[1].strides[3] : 0};
  const float number = static_cast<float>(s.number);
  const bool plain = s.out.type == F32 && s.in[0].type == F32 &&
                     (!has_two || s.in[1].type == F32) &&
                     (n == 1 || (steps[0] == 1 && steps[1] == 1 && steps[2] <= 1));
  for (int64_t index = begin * lines; index < end * lines; index++) {
    const int64_t to = line(s, s.out, index), a = line(s, s.in[0], index);
    const int64_t b = has_two ? line(s, s.in[1], index) : 0;
    if (plain) {
      float* out = reinterpret_cast<float*>(s.out.data) + to;
      const float* x = reinterpret_cast<const float*>(s.in[0].data) + a;
      const float* y = has_two ? reinterpret_cast<const float*>(s.in[1].data) + b : x;
      const bool same = has_two && steps[2] == 0;
      const __m512 fixed = _mm512_set1_ps(*y);
      int64_t i = 0;
      for (; i + 16 <= n; i += 16) {
        const __m512 other = same ? fixed : _mm512_loadu_ps(y + i);
        _mm512_storeu_ps(out + i, apply(OP, _mm512_loadu_ps(x + i), other, number));
      }
      if (i == n) continue;
      const __mmask16 mask = first(n - i);
      store(out + i, mask, apply(OP, load(x + i, mask), same ? fixed : load(y + i, mask), number));
      continue;
    }
    for (int64_t i = 0; i < n; i += 16) {
      const __mmask16 mask = first(n - i);
      const __m512 x = elements(s.in[0], a + i * steps[1], steps[1], mask);
      const __m512 y = has_two ? elements(s.in[1], b + i * steps[2], steps[2], mask) : x;
      put(s.out, to + i * steps[0], steps[0], mask, apply(OP, x, y, number));
    }
  }
}

float sum_of(const Step& s, const Operand& o, int64_t from, float center, bool squares) {
  __m512 sums[4] = {};
  for (int64_t i = 0; i < s.sizes[3]; i += 16) {
    const __mmask16 mask = first(s.sizes[3] - i);
    __m512 v = elements(o, from + i * o.strides[3], o.strides[3], mask);
    v = _mm512_maskz_sub_ps(mask, v, _mm512_set1_ps(center));
    __m512& sum = sums[i / 16 % 4];
    sum = squares ? _mm512_fmadd_ps(v, v, sum) : _mm512_add_ps(sum, v);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]),
                                            _mm512_add_ps(sums[2], sums[3])));
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

// Tokens begin..end, or whatever the first of the four sizes counts.
using Lines = void (*)(const Step&, int64_t, int64_t);

template <void (*F)(const Step&, int64_t)>
void each_line(const Step& s, int64_t begin, int64_t end) {
  const int64_t lines = s.sizes[1] * s.sizes[2];
  for (int64_t i = begin * lines; i < end * lines; i++) F(s, i);
}

void some_of_cache(const Step& s, int64_t begin, int64_t end) {
  const Copy& c = *static_cast<const Copy*>(s.call);
  if (c.queries == 1) return write_some(c, begin, end, 0, 1);  // tokens are rows
  write_some(c, 0, c.rows, begin, end);
}

template <size_t... I>
constexpr std::array<Lines, sizeof...(I)> make_lines(std::index_sequence<I...>) {
  return {elementwise<I>...};
}
constexpr auto ELEMENTWISE = make_lines(std::make_index_sequence<MEAN>{});

Lines lines_of(int32_t op) {
  switch (op) {
    case MEAN: return each_line<mean>;
    case LAYER_NORM: return each_line<layer_norm>;
    case GATHER: return each_line<gather>;
    case WRITE_CACHE: return some_of_cache;
    default: return ELEMENTWISE[op];
  }
}

int64_t numbers_per_token(const Step& s) {
  if (s.op != WRITE_CACHE) return s.sizes[1] * s.sizes[2] * s.sizes[3];
  const Copy& c = *static_cast<const Copy*>(s.call);
  return c.rows * c.queries * c.heads * c.size / s.sizes[0];
}

// Steps of which each thread does all for its tokens, a few tokens at a time: so it finds in its
// cache what the step before made, and nobody waits for anybody in between.
void run_together(const Step* steps) {
  const int64_t tokens = steps->sizes[0];
  int64_t widest = 1, work = 0;
  for (const Step* s = steps; s < steps + steps->together; s++) {
    const int64_t numbers = numbers_per_token(*s);
    widest = std::max(widest, numbers), work += numbers;
  }
  const int64_t few = std::max<int64_t>(1, AT_ONCE / widest);
  auto some = [&](int64_t b, int64_t e) {
    for (; b < e; b += few)
      for (const Step* s = steps; s < steps + steps->together; s++)
        lines_of(s->op)(*s, b, std::min(b + few, e));
  };
  if (tokens * work < WORTH_SHARING) return some(0, tokens);
  std::lock_guard<std::mutex> lock(busy);
  team->run(tokens, some);
}

}  // namespace

extern "C" {

void run_steps(const Step* steps, int64_t count) {
  for (const Step* s = steps; s < steps + count; s += std::max<int64_t>(1, s->together)) {
    if (s->together) {
      run_together(s);
    } else if (s->op == LINEAR) {
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
      lines_of(s->op)(*s, 0, s->sizes[0]);
    }
  }
}

}  // extern "C"

// ---- drawing tokens --------------------------------------------------------------------------
//
// What engine/sampling/sampler.py defines, for rows where there is no doubt about it. Every token's score is
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

// ---- looking inside --------------------------------------------------------------------------
//
// What inspection says of a step that has been done, in float32. No token depends on it.

extern "C" {
struct Figures {
  const float* logits;
  int64_t size, token, count;  // ``count`` of the likeliest are wanted
  double logprob, entropy;     // of the token; of all, in nats
  int64_t rank;                // how many are likelier than the token
};
}

namespace {

// How much of what a head's query reads comes from each key; gives what its sink takes.
float weigh(const Attention& a, int64_t row, int64_t head, int64_t query, int64_t keys,
            float* shares) {
  const int64_t end = std::min(a.starts[row] + query + 1, keys);
  const int64_t begin = a.window ? std::max<int64_t>(0, a.starts[row] + query + 1 - a.window) : 0;
  const int64_t q = row * a.q_strides[0] + head * a.q_strides[1] + query * a.q_strides[2];
  const int64_t k = row * a.k_strides[0] + head / (a.heads / a.kv_heads) * a.k_strides[1];
  std::fill_n(shares, keys, 0.f);
  for (int64_t j = begin; j < end; j++) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < a.size; i += 16) {
      const __mmask16 mask = first(a.size - i);
      sum = _mm512_fmadd_ps(load(a.q, a.q_type, q + i, mask),
                            load(a.k, a.kv_type, k + j * a.k_strides[2] + i, mask), sum);
    }
    shares[j] = _mm512_reduce_add_ps(sum) * a.scale;
  }
  float peak = a.sinks ? a.sinks[head] : -INFINITY;
  for (int64_t j = begin; j < end; j += 16) {
    const __mmask16 mask = first(end - j);
    if (a.softcap) store(shares + j, mask, capped(load(shares + j, mask), a.softcap));
    peak = std::max(peak, _mm512_mask_reduce_max_ps(mask, load(shares + j, mask)));
  }
  const __m512 highest = _mm512_set1_ps(peak);
  const float sink = a.sinks ? _mm512_cvtss_f32(exp16(_mm512_set1_ps(a.sinks[head] - peak))) : 0;
  double total = sink;
  for (int64_t j = begin; j < end; j += 16) {
    const __mmask16 mask = first(end - j);
    const __m512 e = exp16(_mm512_sub_ps(load(shares + j, mask), highest));
    store(shares + j, mask, e);
    total += _mm512_mask_reduce_add_ps(mask, e);
  }
  for (int64_t j = begin; j < end; j++) shares[j] = static_cast<float>(shares[j] / total);
  return static_cast<float>(sink / total);
}

// The likeliest ``f.count``, the likeliest first, of equals the first; ``tops``: the largest of
// each PART.
void find_likeliest(const Figures& f, std::vector<float>& tops, int64_t* ids) {
  float least = -INFINITY;  // as many are as large as this
  if (f.count < static_cast<int64_t>(tops.size())) {
    std::nth_element(tops.begin(), tops.begin() + f.count - 1, tops.end(), std::greater<float>());
    least = tops[f.count - 1];
  }
  std::vector<int64_t> able;
  for (int64_t i = 0; i < f.size; i += 16) {
    const __mmask16 mask = first(f.size - i);
    int found = _mm512_mask_cmp_ps_mask(mask, load(f.logits + i, mask), _mm512_set1_ps(least),
                                        _CMP_GE_OQ);
    for (; found; found &= found - 1) able.push_back(i + __builtin_ctz(found));
  }
  std::partial_sort(able.begin(), able.begin() + f.count, able.end(), [&](int64_t a, int64_t b) {
    return f.logits[a] > f.logits[b] || (f.logits[a] == f.logits[b] && a < b);
  });
  std::copy_n(able.begin(), f.count, ids);
}

}  // namespace

extern "C" {

// Shares (heads, count, keys) of a row's queries from ``query`` on, and those of the sinks (heads,
// count), unless that is null.
void shares(const Attention* call, int64_t row, int64_t query, int64_t count, int64_t keys,
            float* to, float* sinks) {
  std::lock_guard<std::mutex> lock(busy);
  team->run(call->heads * count, [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; i++) {
      const float taken = weigh(*call, row, i / count, query + i % count, keys, to + i * keys);
      if (sinks) sinks[i] = taken;
    }
  });
}

// ``ids`` and ``probs`` (count) of the likeliest tokens, and what else is said of the row, which
// must be without NaN.
void figures(Figures* row, int64_t* ids, float* probs) {
  Figures& f = *row;
  static thread_local std::vector<float> tops;
  tops.clear();
  const __m512 own = _mm512_set1_ps(f.logits[f.token]);
  f.rank = 0;
  for (int64_t from = 0; from < f.size; from += PART) {
    __m512 most = _mm512_set1_ps(-INFINITY);
    for (int64_t i = from; i < std::min(from + PART, f.size); i += 16) {
      const __mmask16 mask = first(f.size - i);
      const __m512 x = load(f.logits + i, mask);
      most = _mm512_mask_max_ps(most, mask, most, x);
      f.rank += __builtin_popcount(_mm512_mask_cmp_ps_mask(mask, x, own, _CMP_GT_OQ));
    }
    tops.push_back(_mm512_reduce_max_ps(most));
  }
  const float best = *std::max_element(tops.begin(), tops.end());
  double total = 0, weighted = 0;
  for (int64_t from = 0; from < f.size; from += PART) {
    __m512 sum = _mm512_setzero_ps(), product = _mm512_setzero_ps();
    for (int64_t i = from; i < std::min(from + PART, f.size); i += 16) {
      const __mmask16 mask = first(f.size - i);
      const __m512 x = _mm512_sub_ps(load(f.logits + i, mask), _mm512_set1_ps(best));
      const __m512 e = _mm512_maskz_mov_ps(mask, exp16(x));
      sum = _mm512_add_ps(sum, e);
      // 0 times what is infinitely unlikely is nothing
      product = _mm512_fmadd_ps(_mm512_max_ps(x, _mm512_set1_ps(-104.f)), e, product);
    }
    total += _mm512_reduce_add_ps(sum), weighted += _mm512_reduce_add_ps(product);
  }
  f.logprob = static_cast<double>(f.logits[f.token]) - best - std::log(total);
  f.entropy = std::max(0., std::log(total) - weighted / total);
  f.count = std::min(f.count, f.size);
  if (!f.count) return;
  find_likeliest(f, tops, ids);
  for (int64_t i = 0; i < f.count; i++)
    probs[i] = static_cast<float>(std::exp(static_cast<double>(f.logits[ids[i]]) - best) / total);
}

}  // extern "C"
