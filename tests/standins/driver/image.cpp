// Reads PTX and cubins: see image.h.
#include "image.h"

#include <ctype.h>
#include <elf.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

namespace standin {

namespace {

// ".param .u64 name", ".param .align 8 .b8 name[256]": bytes of one parameter, 0 if unknown.
size_t parameter_bytes(const std::string& text) {
    size_t array = text.find(".b8 ");
    if (array != std::string::npos) {
        size_t bracket = text.find('[', array);
        return bracket == std::string::npos ? 1 : strtoul(text.c_str() + bracket + 1, nullptr, 10);
    }
    for (size_t at = text.find('.', 1); at != std::string::npos; at = text.find('.', at + 1)) {
        size_t digits = at + 2;   // after ".u", ".s", ".f", ".b"
        if (digits < text.size() && strchr("usfb", text[at + 1]) && isdigit(text[digits]))
            return strtoul(text.c_str() + digits, nullptr, 10) / 8;
    }
    return 0;
}

std::map<std::string, Entry> read_ptx(const std::string& text) {
    std::map<std::string, Entry> entries;
    const std::string word = ".entry ";
    for (size_t at = text.find(word); at != std::string::npos; at = text.find(word, at)) {
        at += word.size();
        size_t open = text.find_first_of("({", at);
        if (open == std::string::npos) break;
        std::string name = text.substr(at, open - at);
        name.erase(name.find_last_not_of(" \t\r\n") + 1);
        Entry& entry = entries[name];
        if (text[open] != '(') continue;
        size_t close = text.find(')', open);
        std::string list = text.substr(open, close - open);
        for (size_t from = list.find(".param"); from != std::string::npos;) {
            size_t next = list.find(".param", from + 1);
            entry.parameters.push_back(parameter_bytes(list.substr(from, next - from)));
            from = next;
        }
    }
    return entries;
}

// In a section .nv.info.NAME each attribute is a format, a number, and either a value of two bytes
// or a size of two bytes and that many bytes of data.
void read_kernel_information(const char* data, size_t bytes, Entry& entry) {
    constexpr int HAS_SIZE = 4, PARAMETER = 0x17;
    for (size_t at = 0; at + 4 <= bytes;) {
        int format = (unsigned char)data[at], number = (unsigned char)data[at + 1];
        uint16_t size;
        memcpy(&size, data + at + 2, 2);
        at += 4;
        if (format != HAS_SIZE) continue;
        if (number == PARAMETER && size == 12 && at + 12 <= bytes) {
            uint16_t ordinal;
            uint32_t packed;   // the size in bytes is in bits 18 to 31
            memcpy(&ordinal, data + at + 4, 2);
            memcpy(&packed, data + at + 8, 4);
            if (entry.parameters.size() <= ordinal) entry.parameters.resize(ordinal + 1);
            entry.parameters[ordinal] = packed >> 18;
        }
        at += size;
    }
}

std::map<std::string, Entry> read_cubin(const char* image) {
    std::map<std::string, Entry> entries;
    Elf64_Ehdr header;
    memcpy(&header, image, sizeof header);
    std::vector<Elf64_Shdr> sections(header.e_shnum);
    if (sections.empty()) return entries;
    memcpy(sections.data(), image + header.e_shoff, sections.size() * sizeof(Elf64_Shdr));
    const char* names = image + sections[header.e_shstrndx].sh_offset;
    auto after = [&](const Elf64_Shdr& section, const char* prefix) {
        const char* name = names + section.sh_name;
        size_t length = strlen(prefix);
        return strncmp(name, prefix, length) ? std::string() : std::string(name + length);
    };
    for (const Elf64_Shdr& section : sections)
        if (std::string name = after(section, ".text."); !name.empty()) entries[name];
    for (const Elf64_Shdr& section : sections) {
        auto information = entries.find(after(section, ".nv.info."));
        if (information != entries.end())
            read_kernel_information(image + section.sh_offset, section.sh_size,
                                    information->second);
        auto shared = entries.find(after(section, ".nv.shared."));
        // From sm_80 on the first KiB belongs to the system.
        if (shared != entries.end() && section.sh_size > 1024)
            shared->second.static_shared = section.sh_size - 1024;
    }
    return entries;
}

}  // namespace

std::map<std::string, Entry> read_image(const void* image) {
    auto* bytes = static_cast<const char*>(image);
    if (!memcmp(bytes, ELFMAG, SELFMAG)) return read_cubin(bytes);
    if (strstr(bytes, ".version")) return read_ptx(bytes);
    return {};
}

}  // namespace standin
