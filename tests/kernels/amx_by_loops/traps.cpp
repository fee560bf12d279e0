// Instructions of AMX's tile unit where there is none: each ends in the signal for an illegal one,
// whose handler decodes it and does what immintrin.h says beside this file. So a program can be tested
// that was compiled with the instructions themselves.

#include "immintrin.h"

#include <signal.h>
#include <ucontext.h>

namespace {

using namespace amx_by_loops;

constexpr int REGISTERS[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                               REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                               REG_R12, REG_R13, REG_R14, REG_R15};

// An instruction with a VEX prefix of three bytes; ``length`` with all that belongs to it.
struct Instruction {
  int prefix, opcode, mode, reg, rm, third;
  int64_t base, stride, length;  // of its operand in memory: the index is the stride of rows

  Instruction(const uint8_t* p, const greg_t* registers) {
    check(p[0] == 0xc4 && (p[1] & 31) == 2, "an illegal instruction of another kind");
    prefix = p[2] & 3, opcode = p[3], third = ~p[2] >> 3 & 15;
    mode = p[4] >> 6, reg = p[4] >> 3 & 7, rm = p[4] & 7;
    base = stride = 0, length = 5;
    if (mode == 3) return;
    const int high_index = (~p[1] >> 6 & 1) * 8, high_base = (~p[1] >> 5 & 1) * 8;
    auto value = [&](int number) { return static_cast<int64_t>(registers[REGISTERS[number]]); };
    int number = rm;
    if (rm == 4) {
      const uint8_t sib = p[length++];
      const int index = (sib >> 3 & 7) + high_index;
      number = sib & 7;
      if (index != 4) stride = value(index) << (sib >> 6);
    }
    const bool is_bare = mode == 0 && number == 5;  // no base: the next instruction's address, or none
    const int64_t bytes = mode == 1 ? 1 : mode == 2 || is_bare ? 4 : 0;
    int32_t displacement = 0;
    if (bytes == 1) displacement = static_cast<int8_t>(p[length]);
    if (bytes == 4) std::memcpy(&displacement, p + length, 4);
    length += bytes;
    base = displacement;
    if (!is_bare) base += value(number + high_base);
    if (is_bare && rm == 5) base += reinterpret_cast<int64_t>(p) + length;
  }
};

enum Prefix { NONE, P66, PF3, PF2 };

void execute(const Instruction& i) {
  auto is = [&](Prefix prefix, int opcode) { return i.prefix == prefix && i.opcode == opcode; };
  void* memory = reinterpret_cast<void*>(i.base);
  if (is(NONE, 0x49) && i.mode != 3) return load_config(memory);
  if (is(NONE, 0x49)) return release();
  if (is(PF2, 0x49)) return clear(i.reg);
  if (is(PF2, 0x4b) || is(P66, 0x4b)) return load(i.reg, memory, i.stride);
  if (is(PF3, 0x4b)) return store(i.reg, memory, i.stride);
  if (is(PF3, 0x5c)) return multiply_bf16(i.reg, i.rm, i.third);
  if (is(PF3, 0x5e)) return multiply_codes(i.reg, i.rm, i.third);
  check(false, "an instruction that the kernels do not need");
}

void handle(int, siginfo_t*, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const Instruction i(reinterpret_cast<const uint8_t*>(registers[REG_RIP]), registers);
  execute(i);
  registers[REG_RIP] += i.length;
}

[[gnu::constructor]] void install() {
  struct sigaction action = {};
  action.sa_sigaction = handle, action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGILL, &action, nullptr);
}

}  // namespace
