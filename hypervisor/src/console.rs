//! The consoles of all guests on the one console of the machine.
//!
//! Purpose: each virtual machine has a [`Terminal`]: what it prints is kept in a ring, and goes to the machine's console
//! while it is in the foreground, and to the control channel while somebody is attached there. What is typed goes to the one
//! in the foreground.
//!
//! The escape key is Ctrl-] (0x1d). After it: a digit 1–9 brings that virtual machine to the foreground, `n` the next
//! one, `l` lists them, `?` helps, Ctrl-] itself is sent to the guest. The host's tool keeps `Ctrl-] x` (end the machine)
//! for itself.
//!
//! Protocol of input: received bytes wait in a queue; [`pump`], which is host's work, offers them to the foreground guest
//! until it takes no more; it is called again when the guest has room. While the queue is full the serial port is not
//! read, so that the sender waits: nothing that was sent is lost.
//!
//! Lock order: input → terminals → a terminal's ring → the machine's console. A guest's output takes its ring alone.

use alloc::collections::VecDeque;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::arch::boot::BootInfo;
use crate::arch::{console as machine, lines};
use entresol_devices::bus;
use entresol_sync::Mutex;
use entresol_sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use crate::host_work::{self, Work};
use crate::registry;
use crate::vm::OutOfHeap;

/// Bytes of output that are kept for whoever looks later.
const KEPT: usize = 64 << 10;
/// Bytes of input that wait.
const WAITING: usize = 4 << 10;
/// Ctrl-].
const ESCAPE: u8 = 0x1d;

/// A guest's console, on the hypervisor's side.
pub struct Terminal {
    number: usize,
    output: Mutex<Output>,
}

/// What was printed, and how far others have read it.
struct Output {
    kept: VecDeque<u8>,
    /// Bytes printed in all.
    total: u64,
}

static FOREGROUND: AtomicUsize = AtomicUsize::new(0);
static INTID: AtomicU32 = AtomicU32::new(u32::MAX);
/// Names and terminals, by number.
static TERMINALS: Mutex<Vec<(String, Arc<Terminal>)>> = Mutex::new(Vec::new());
static INPUT: Mutex<Input> = Mutex::new(Input { waiting: VecDeque::new(), escaped: false });

struct Input {
    waiting: VecDeque<u8>,
    escaped: bool,
}

/// Makes a terminal for each of `names`; `foreground` has the console first.
///
/// # Errors
///
/// [`OutOfHeap`].
pub fn init(info: &BootInfo, names: &[&str], foreground: usize) -> Result<(), OutOfHeap> {
    INPUT.lock().waiting.try_reserve_exact(WAITING).map_err(|_| OutOfHeap)?;
    let mut terminals = Vec::new();
    terminals.try_reserve_exact(names.len()).map_err(|_| OutOfHeap)?;
    for (number, name) in names.iter().enumerate() {
        terminals.push((String::from(*name), Terminal::new(number)?));
    }
    *TERMINALS.lock() = terminals;
    FOREGROUND.store(foreground, Ordering::Relaxed);
    INTID.store(info.uart.intid, Ordering::Relaxed);
    machine::enable_rx_interrupt();
    if let Err(error) = lines::enable(info.uart.intid) {
        log::error!("console: no input: {error}");
    }
    Ok(())
}

/// Whether `intid` is the machine's serial port.
pub fn owns(intid: u32) -> bool {
    INTID.load(Ordering::Relaxed) == intid
}

/// The terminal of virtual machine `number`.
pub fn terminal(number: usize) -> Option<Arc<Terminal>> {
    TERMINALS.lock().get(number).map(|(_, terminal)| terminal.clone())
}

/// Makes room for `more` terminals behind those that there are.
///
/// # Errors
///
/// [`OutOfHeap`].
pub fn reserve(more: usize) -> Result<(), OutOfHeap> {
    TERMINALS.lock().try_reserve(more).map_err(|_| OutOfHeap)
}

/// Virtual machine `terminal.number` is called `name` and has this terminal: a new one, for which there is room, or another
/// in the place of one that has ended.
pub fn set(name: String, terminal: Arc<Terminal>) {
    let mut terminals = TERMINALS.lock();
    let number = terminal.number;
    match terminals.get_mut(number) {
        Some(place) => *place = (name, terminal),
        None => {
            assert_eq!(terminals.len(), number, "numbers have no gaps");
            terminals.push((name, terminal));
        }
    }
}

impl Terminal {
    /// An empty one for virtual machine `number`.
    ///
    /// # Errors
    ///
    /// [`OutOfHeap`].
    pub fn new(number: usize) -> Result<Arc<Self>, OutOfHeap> {
        let mut kept = VecDeque::new();
        kept.try_reserve_exact(KEPT).map_err(|_| OutOfHeap)?;
        Ok(Arc::new(Self { number, output: Mutex::new(Output { kept, total: 0 }) }))
    }

    /// Copies what was printed from position `from` on, as far as it is still kept, to `to`. Returns the position of the
    /// first byte copied and how many were.
    pub fn read_from(&self, from: u64, to: &mut [u8]) -> (u64, usize) {
        let output = self.output.lock();
        let oldest = output.total - output.kept.len() as u64;
        let start = from.clamp(oldest, output.total);
        let bytes = output.kept.iter().skip((start - oldest) as usize);
        let count = to.iter_mut().zip(bytes).map(|(place, byte)| *place = *byte).count();
        (start, count)
    }
}

impl bus::Terminal for Terminal {
    fn put(&self, bytes: &[u8]) {
        {
            let mut output = self.output.lock();
            output.total += bytes.len() as u64;
            for byte in bytes {
                if output.kept.len() == KEPT {
                    output.kept.pop_front();
                }
                output.kept.push_back(*byte);
            }
            if FOREGROUND.load(Ordering::Relaxed) == self.number {
                machine::write_bytes(bytes);
            }
        }
        crate::control::printed(self.number);
    }

    fn input_wanted(&self) {
        host_work::raise(Work::Console);
        crate::control::input_wanted(self.number);
    }
}

/// The serial port interrupts: takes what it has, as far as there is room.
pub fn receive() {
    let mut input = INPUT.lock();
    while input.waiting.len() < WAITING {
        let Some(byte) = machine::read_byte() else { return };
        input.waiting.push_back(byte);
    }
    // Full: the port keeps its interrupt asserted, so it is held back until there is room.
    let intid = INTID.load(Ordering::Relaxed);
    if let Err(error) = lines::disable(intid) {
        log::error!("console: {error}");
    }
}

/// Offers waiting input to the foreground guest; obeys escapes.
pub fn pump() {
    let mut input = INPUT.lock();
    let was_full = input.waiting.len() == WAITING;
    while let Some(&byte) = input.waiting.front() {
        if input.escaped {
            input.waiting.pop_front();
            input.escaped = false;
            if byte != ESCAPE {
                obey(byte);
                continue;
            }
            if !offer(&[byte]) {
                input.waiting.push_front(byte);
                input.escaped = true;
                break;
            }
        } else if byte == ESCAPE {
            input.waiting.pop_front();
            input.escaped = true;
        } else if offer(&[byte]) {
            input.waiting.pop_front();
        } else {
            break;
        }
    }
    let is_full = input.waiting.len() == WAITING;
    drop(input);
    if was_full && !is_full {
        if let Err(error) = lines::enable(INTID.load(Ordering::Relaxed)) {
            log::error!("console: {error}");
        }
        // What the port held meanwhile, and no interrupt will tell of any more once it is read.
        receive();
        host_work::raise(Work::Console);
    }
}

fn offer(bytes: &[u8]) -> bool {
    let number = FOREGROUND.load(Ordering::Relaxed);
    match registry::find(number) {
        Some(vm) => vm.offer(bytes) == bytes.len(),
        // A virtual machine that has ended reads nothing: what is typed at it is gone.
        None => true,
    }
}

/// A key after the escape key.
fn obey(key: u8) {
    let count = TERMINALS.lock().len();
    let current = FOREGROUND.load(Ordering::Relaxed);
    match key {
        b'1'..=b'9' if usize::from(key - b'1') < count => show(usize::from(key - b'1')),
        b'n' => show((current + 1) % count.max(1)),
        b'l' => {
            for (number, (name, _)) in TERMINALS.lock().iter().enumerate() {
                let mark = if number == current { '*' } else { ' ' };
                machine::write_fmt(format_args!("\n{mark}{} {name}", number + 1));
            }
            machine::write_fmt(format_args!("\n"));
        }
        _ => machine::write_fmt(format_args!(
            "\n[entresol: Ctrl-] then 1-9: console of that VM, n: next, l: list, x: end the machine, Ctrl-]: itself]\n"
        )),
    }
}

/// Brings virtual machine `number` to the foreground, with the end of what it printed.
fn show(number: usize) {
    const TAIL: u64 = 2048;
    let terminals = TERMINALS.lock();
    let Some((name, terminal)) = terminals.get(number) else { return };
    let output = terminal.output.lock();
    FOREGROUND.store(number, Ordering::Relaxed);
    machine::write_fmt(format_args!("\n[entresol: console of {name}]\n"));
    let skip = (output.kept.len() as u64).saturating_sub(TAIL) as usize;
    for byte in output.kept.iter().skip(skip) {
        machine::write_bytes(&[*byte]);
    }
}
