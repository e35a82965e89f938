// Runs kernels for another program: loads the library named, then answers calls on standard input until it ends.
// Built for another processor and run under an emulator, it lets the conformance suite judge that processor's kernels.
// tests/ops/arm.py holds the other end. Numbers are as they lie in memory: both ends are little-endian, of 64 bits.
//
//   emulated LIBRARY [OPENMP]    with OPENMP, that runtime is loaded globally first, as torch loads its own
//
// It begins with three texts: the instruction set, the kind of threads, the version of the interface.
// Call: function, dtype (int32), structure of arguments, count of buffers (uint64), and each: offset of its pointer in
// the structure (uint64), contents. Answer: status (int32), the contents of each buffer. Texts, structures and contents
// have their length (uint64) in front.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace {

constexpr size_t kGuard = 64;  // bytes before and behind each buffer that no kernel may write
constexpr char kGuardByte = 0x5a;
constexpr int kBeyond = -2;  // the status of a call that did

[[noreturn]] void fail(const std::string& message) {
    std::fprintf(stderr, "emulated: %s\n", message.c_str());
    std::exit(1);
}

void read(void* to, size_t bytes) {
    if (bytes && std::fread(to, 1, bytes, stdin) != bytes) fail("a call that breaks off");
}

template <typename T> T read() {
    T value;
    read(&value, sizeof value);
    return value;
}

std::string read_bytes() {
    std::string bytes(read<uint64_t>(), 0);
    read(bytes.data(), bytes.size());
    return bytes;
}

void write(const void* from, size_t bytes) {
    if (bytes && std::fwrite(from, 1, bytes, stdout) != bytes) fail("nobody reads");
}

void write_text(const std::string& text) {
    const uint64_t bytes = text.size();
    write(&bytes, sizeof bytes);
    write(text.data(), text.size());
}

struct Guarded {
    uint64_t offset;
    std::string memory;

    Guarded() : offset(read<uint64_t>()) {
        const std::string contents = read_bytes(), guard(kGuard, kGuardByte);
        memory = guard + contents + guard;
    }
    char* data() { return memory.data() + kGuard; }
    size_t size() const { return memory.size() - 2 * kGuard; }
    bool intact() const {
        const std::string guard(kGuard, kGuardByte);
        return !memory.compare(0, kGuard, guard) && !memory.compare(memory.size() - kGuard, kGuard, guard);
    }
};

template <typename Function> Function* function(void* library, const std::string& name) {
    void* found = dlsym(library, name.c_str());
    if (!found) fail("the library has no " + name);
    return reinterpret_cast<Function*>(found);
}

void answer(void* library) {
    auto* kernel = function<int(const void*, int)>(library, read_bytes());
    const auto dtype = read<int32_t>();
    std::string arguments = read_bytes();
    std::vector<Guarded> buffers(read<uint64_t>());
    for (Guarded& buffer : buffers) {
        char* data = buffer.data();
        if (buffer.offset + sizeof data > arguments.size()) fail("a pointer beyond the arguments");
        std::memcpy(arguments.data() + buffer.offset, &data, sizeof data);
    }
    int32_t status = kernel(arguments.data(), dtype);
    for (const Guarded& buffer : buffers)
        if (!buffer.intact()) status = kBeyond;
    write(&status, sizeof status);
    for (Guarded& buffer : buffers) write_text({buffer.data(), buffer.size()});
}

}  // namespace

int main(int count, char** arguments) {
    if (count < 2 || count > 3) fail("expected LIBRARY [OPENMP]");
    if (count == 3 && !dlopen(arguments[2], RTLD_NOW | RTLD_GLOBAL)) fail(dlerror());
    void* library = dlopen(arguments[1], RTLD_NOW);
    if (!library) fail(dlerror());
    write_text(function<const char*()>(library, "sparse_ops_instruction_set")());
    write_text(function<const char*()>(library, "sparse_ops_threads")());
    write_text(std::to_string(function<int()>(library, "sparse_ops_interface_version")()));
    std::fflush(stdout);
    for (int next; (next = std::getchar()) != EOF; std::fflush(stdout)) {
        std::ungetc(next, stdin);
        answer(library);
    }
}
