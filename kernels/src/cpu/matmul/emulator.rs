//! Tile instructions for processors that have none: a handler of the signal for unknown instructions does what they would have done, as
//! Intel's manual (volume 2, "TDPBF16PS" and its neighbours) describes it. Tests of the AMX path run anywhere with it, if slowly.

use std::cell::RefCell;
use std::sync::Once;

use half::bf16;

/// A thread's tile registers: 16 rows of 64 bytes each.
struct Tiles {
    configured: bool,
    registers: [[[u8; 64]; 16]; 8],
}

thread_local! {
    static TILES: RefCell<Tiles> = const { RefCell::new(Tiles { configured: false, registers: [[[0; 64]; 16]; 8] }) };
}

/// From now on, tile instructions work in every thread of this process.
pub(super) fn install() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        // SAFETY: the handler has the signature that SA_SIGINFO asks for, and touches its arguments, the thread's `TILES` and what
        // the instruction names.
        let result = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handle as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            libc::sigaction(libc::SIGILL, &action, std::ptr::null_mut())
        };
        assert_eq!(result, 0, "sigaction");
    });
}

unsafe extern "C" fn handle(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the system passes the interrupted thread's context, and the instruction pointer is at an instruction.
    unsafe {
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        match emulate(registers) {
            Some(length) => registers[libc::REG_RIP as usize] += length as i64,
            // Not one of ours: the instruction runs again, and the signal ends the process.
            None => _ = libc::signal(libc::SIGILL, libc::SIG_DFL),
        }
    }
}

/// Numbers of general registers, in the order in which instructions count them.
const GENERAL: [libc::c_int; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

/// The memory that an instruction names: rows `stride` bytes apart.
struct Memory {
    start: *mut u8,
    stride: usize,
    /// Bytes of the instruction up to its end.
    length: usize,
}

/// Does what the instruction says; returns its length, or none for one that is not known here.
///
/// # Safety
/// The instruction pointer is at an instruction, and what it names exists.
unsafe fn emulate(registers: &[i64; 23]) -> Option<usize> {
    // SAFETY: the caller's promise. All known instructions have three bytes of prefix, an opcode and a byte that names operands.
    unsafe {
        let code = registers[libc::REG_RIP as usize] as *const u8;
        let byte = |index: usize| usize::from(*code.add(index));
        // VEX with the map 0F38, W0 and 128 bits.
        if byte(0) != 0xc4 || byte(1) & 0x1f != 2 || byte(2) & 0x84 != 0 {
            return None;
        }
        let (prefix, opcode, operands) = (byte(2) & 3, byte(3), byte(4));
        let (mode, register, other) = (operands >> 6, operands >> 3 & 7, operands & 7);
        let third = !byte(2) >> 3 & 7;
        TILES.with_borrow_mut(|tiles| {
            if opcode != 0x49 && !tiles.configured {
                return None;
            }
            match (opcode, prefix, mode) {
                // tilerelease
                (0x49, 0, 3) => {
                    tiles.configured = false;
                    Some(5)
                }
                // ldtilecfg: palette 1, 64 bytes by 16 rows for each register, is what is known here.
                (0x49, 0, _) => {
                    let memory = memory(code, registers);
                    let configuration = std::slice::from_raw_parts(memory.start, 64);
                    let widths = configuration[16..32].chunks(2).all(|width| width == [64, 0]);
                    let rows = configuration[48..56].iter().all(|&rows| rows == 16);
                    (configuration[0] == 1 && configuration[1] == 0 && widths && rows).then(|| {
                        tiles.configured = true;
                        tiles.registers = [[[0; 64]; 16]; 8];
                        memory.length
                    })
                }
                // tilezero
                (0x49, 3, 3) => {
                    tiles.registers[register] = [[0; 64]; 16];
                    Some(5)
                }
                // tileloadd, tileloaddt1, tilestored
                (0x4b, 1..=3, 0..=2) => {
                    let memory = memory(code, registers);
                    for (row, bytes) in tiles.registers[register].iter_mut().enumerate() {
                        let at = memory.start.wrapping_add(row.wrapping_mul(memory.stride));
                        match prefix {
                            2 => std::ptr::copy_nonoverlapping(bytes.as_ptr(), at, 64),
                            _ => std::ptr::copy_nonoverlapping(at, bytes.as_mut_ptr(), 64),
                        }
                    }
                    Some(memory.length)
                }
                // tdpbf16ps
                (0x5c, 2, 3) => {
                    let (left, right) = (tiles.registers[other], tiles.registers[third]);
                    multiply(&mut tiles.registers[register], &left, &right);
                    Some(5)
                }
                _ => None,
            }
        })
    }
}

/// # Safety
/// `code` is an instruction with five bytes or more that names memory.
unsafe fn memory(code: *const u8, registers: &[i64; 23]) -> Memory {
    // SAFETY: the caller's promise; further bytes exist where earlier ones say so.
    unsafe {
        let general = |number: usize| registers[GENERAL[number] as usize] as usize;
        let (extension, operands) = (!*code.add(1), *code.add(4));
        let (mode, mut base) = (operands >> 6, usize::from(operands & 7));
        let (mut length, mut stride) = (5, 0);
        if base == 4 {
            let scaled = *code.add(5);
            base = usize::from(scaled & 7);
            let index = usize::from(scaled >> 3 & 7) | usize::from(extension >> 6 & 1) << 3;
            // The stack pointer cannot be an index.
            if index != 4 {
                stride = general(index) << (scaled >> 6);
            }
            length = 6;
        }
        assert!(mode != 0 || base != 5, "an address without a base");
        let base = base | usize::from(extension >> 5 & 1) << 3;
        let displacement = match mode {
            0 => 0,
            1 => i64::from(code.add(length).cast::<i8>().read_unaligned()),
            _ => i64::from(code.add(length).cast::<i32>().read_unaligned()),
        };
        length += [0, 1, 4][usize::from(mode)];
        Memory { start: general(base).wrapping_add(displacement as usize) as *mut u8, stride, length }
    }
}

/// sums\[m\]\[n\] += Σₖ left\[m\]\[k\] · right\[k\], in pairs of steps.
fn multiply(sums: &mut [[u8; 64]; 16], left: &[[u8; 64]; 16], right: &[[u8; 64]; 16]) {
    let element = |row: &[u8; 64], index: usize| bf16::from_le_bytes([row[2 * index], row[2 * index + 1]]).to_f32();
    for (row, left) in sums.iter_mut().zip(left) {
        for (column, sum) in row.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            let (mut even, mut odd) = (0.0f32, 0.0f32);
            for (pair, right) in right.iter().enumerate() {
                even += element(left, 2 * pair) * element(right, 2 * column);
                odd += element(left, 2 * pair + 1) * element(right, 2 * column + 1);
            }
            *sum = (f32::from_le_bytes(*sum) + (even + odd)).to_le_bytes();
        }
    }
}
