//! A guest small enough to write by hand. Firecracker enters it in 64-bit mode with paging on, as the Linux boot protocol
//! says, and port I/O is all it needs.

/// COM1's data register.
const COM1: [u8; 2] = 0x3f8_u16.to_le_bytes();
/// Where it is loaded: above what the boot protocol uses, below the smallest guest's end.
const BASE: u64 = 16 << 20;

/// What the guest does once it has printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// Sleeps for ever.
    Halt,
    /// Resets through the keyboard controller, which ends the VMM.
    Reset,
}

/// An ELF file that prints `text` on the serial console.
pub fn kernel(text: &str, then: Then) -> Vec<u8> {
    let mut code = vec![0x66, 0xba, COM1[0], COM1[1]]; // mov dx, COM1
    for byte in text.bytes() {
        code.extend([0xb0, byte, 0xee]); // mov al, byte; out dx, al
    }
    if then == Then::Reset {
        code.extend([0xb0, 0xfe, 0xe6, 0x64]); // mov al, 0xfe; out 0x64, al
    }
    code.extend([0xf4, 0xeb, 0xfd]); // hlt; jmp back to it
    elf(&code)
}

/// One loadable segment that holds the whole file; the code follows the headers and is entered at its start.
fn elf(code: &[u8]) -> Vec<u8> {
    const HEADERS: u64 = 64 + 56;
    let size = HEADERS + u64::try_from(code.len()).expect("a small guest");
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    file.extend(2_u16.to_le_bytes()); // an executable
    file.extend(62_u16.to_le_bytes()); // for x86-64
    file.extend(1_u32.to_le_bytes());
    file.extend((BASE + HEADERS).to_le_bytes()); // entry
    file.extend(64_u64.to_le_bytes()); // program headers
    file.extend([0; 8 + 4]); // no sections, no flags
    for field in [64_u16, 56, 1, 0, 0, 0] {
        file.extend(field.to_le_bytes());
    }
    file.extend(1_u32.to_le_bytes()); // PT_LOAD
    file.extend(5_u32.to_le_bytes()); // readable, executable
    for field in [0, BASE, BASE, size, size, 4096] {
        file.extend(field.to_le_bytes());
    }
    file.extend(code);
    file
}
