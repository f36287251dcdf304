// What Rust calls, and the table of kernels; src/ffi.rs is the other side.
#include <mutex>

#include "machine.h"

// One entry per call in a kernel: a code address, and where in the source it is (see build/translate.rs). Offsets are
// relative to the field itself.
struct CodeLine {
    std::int32_t site;
    std::int32_t file;
    std::uint32_t line;
    std::uint32_t column;
};
extern "C" const CodeLine __start_dtmem_lines[] __attribute__((weak, visibility("hidden")));
extern "C" const CodeLine __stop_dtmem_lines[] __attribute__((weak, visibility("hidden")));

namespace dtmem_host {

namespace {

const Kernel*& first_kernel() {
    static const Kernel* first = nullptr;
    return first;
}

}  // namespace

void add_kernel(Kernel& kernel) {
    kernel.next = first_kernel();
    first_kernel() = &kernel;
}

const Kernel* kernels() { return first_kernel(); }

Location locate(const void* site) {
    struct Line {
        const char* site;
        const CodeLine* line;
    };
    static const std::vector<Line> lines = [] {
        std::vector<Line> sorted;
        for (const CodeLine* line = __start_dtmem_lines; line != __stop_dtmem_lines; ++line) {
            sorted.push_back({reinterpret_cast<const char*>(&line->site) + line->site, line});
        }
        std::sort(sorted.begin(), sorted.end(), [](const Line& a, const Line& b) { return a.site < b.site; });
        return sorted;
    }();
    const auto* address = static_cast<const char*>(site);
    const auto found = std::lower_bound(lines.begin(), lines.end(), address,
                                        [](const Line& line, const char* address) { return line.site < address; });
    if (found == lines.end() || found->site != address) return {};
    const CodeLine& line = *found->line;
    return {reinterpret_cast<const char*>(&line.file) + line.file, line.line, line.column};
}

}  // namespace dtmem_host

extern "C" {

using namespace dtmem_host;

Machine* dtmem_host_new() { return new Machine(); }
void dtmem_host_delete(Machine* machine) { delete machine; }
std::uint8_t* dtmem_host_allocate(Machine* machine, std::size_t bytes, const void* content) {
    return machine->allocate(bytes, content);
}
void dtmem_host_write(Machine* machine, std::uint64_t address, const void* content, std::size_t bytes) {
    machine->write(address, content, bytes);
}
void dtmem_host_release(Machine* machine, std::uint8_t* data) { machine->release(data); }
bool dtmem_host_holds(Machine* machine, std::uint64_t address, std::uint64_t bytes) {
    return machine->find(address, bytes) != nullptr;
}
const Kernel* dtmem_host_kernels() { return kernels(); }
bool dtmem_host_launch(Machine* machine, const Kernel* kernel, const LaunchShape* shape, const Argument* arguments,
                       std::size_t count, Finding* finding) {
    return machine->launch(*kernel, *shape, arguments, count, *finding);
}

}  // extern "C"
