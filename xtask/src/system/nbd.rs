//! A disk that fails as it is told: a server of the network block device protocol (the NBD project's `doc/proto.md`), for one client,
//! which is QEMU.
//!
//! Purpose: QEMU's own error injection ends with the first request that it makes fail, or never. Here a test says what happens from now on: reads
//! fail, writes fail, writes are cut off in the middle, nothing is answered, or nobody is there at all; and all is right again when it says so.
//!
//! Protocol: one thread accepts, and serves one connection at a time: fixed newstyle negotiation, simple replies. [`Server::set`] changes the mode; a request that
//! has begun ends in the mode that it finds. A connection is cut when the disk is [`Mode::Gone`], and every new one too.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};

/// `NBDMAGIC`, `IHAVEOPT`, and those of requests, simple replies and replies to options.
const SERVER: u64 = 0x4e42_444d_4147_4943;
const OPTION: u64 = 0x4948_4156_454f_5054;
const REQUEST: u32 = 0x2560_9513;
const REPLY: u32 = 0x6744_6698;
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;

/// NBD_FLAG_FIXED_NEWSTYLE and NBD_FLAG_NO_ZEROES; NBD_FLAG_HAS_FLAGS and NBD_FLAG_SEND_FLUSH.
const HANDSHAKE: u16 = 0b11;
const EXPORT: u16 = 0b101;

/// NBD_OPT_ABORT, NBD_OPT_GO.
const ABORT: u32 = 2;
const GO: u32 = 7;
/// NBD_REP_ACK, NBD_REP_INFO, NBD_REP_ERR_UNSUP.
const ACK: u32 = 1;
const INFO: u32 = 3;
const UNSUPPORTED: u32 = 1 << 31 | 1;

/// NBD_CMD_*.
const READ: u16 = 0;
const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
const FLUSH: u16 = 3;

/// NBD_EIO, NBD_EINVAL.
const EIO: u32 = 5;
const EINVAL: u32 = 22;
/// Bytes of an option or a request at most: more than QEMU sends.
const MOST: usize = 32 << 20;

/// How the disk behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// As it should.
    Right,
    /// Reads end with an error.
    NoReads,
    /// Writes end with an error, and nothing is written.
    NoWrites,
    /// Of each write the first half is written, and it ends with an error.
    HalfWrites,
    /// Requests are not answered.
    Silent,
    /// Nobody is there.
    Gone,
}

struct State {
    mode: Mode,
    connection: Option<TcpStream>,
    /// Requests that failed by the mode.
    failed: u64,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// The disk.
pub struct Server {
    port: u16,
    shared: Arc<Shared>,
}

impl Server {
    /// A disk of `size` bytes, all zero.
    ///
    /// # Errors
    /// When there is no port for it.
    pub fn start(size: usize) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("no port for a disk")?;
        let port = listener.local_addr()?.port();
        let state = State { mode: Mode::Right, connection: None, failed: 0 };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let its = Arc::clone(&shared);
        thread::spawn(move || {
            let mut content = vec![0; size];
            for stream in listener.incoming().flatten() {
                if its.attach(&stream)
                    && let Err(error) = serve(&its, &stream, &mut content)
                    && its.lock().mode != Mode::Gone
                {
                    eprintln!("disk at port {port}: {error}");
                }
                its.lock().connection = None;
            }
        });
        Ok(Self { port, shared })
    }

    /// QEMU's description of the drive `id`.
    pub fn drive(&self, id: &str) -> String {
        format!(
            "file.driver=nbd,file.server.type=inet,file.server.host=127.0.0.1,file.server.port={},if=none,id={id},format=raw,\
             cache=none,werror=report,rerror=report",
            self.port
        )
    }

    /// From now on the disk behaves like this.
    pub fn set(&self, mode: Mode) {
        let mut state = self.shared.lock();
        state.mode = mode;
        if mode == Mode::Gone
            && let Some(connection) = state.connection.take()
        {
            // An error says that it is cut already.
            let _ = connection.shutdown(Shutdown::Both);
        }
        self.shared.changed.notify_all();
    }

    /// Waits until QEMU is connected; it tries from time to time. False if it is not after `limit`.
    pub fn is_connected_within(&self, limit: Duration) -> bool {
        let cut = |state: &mut State| state.connection.is_none();
        let waited = self.shared.changed.wait_timeout_while(self.shared.lock(), limit, cut);
        waited.unwrap_or_else(PoisonError::into_inner).0.connection.is_some()
    }

    /// Requests that failed so far, or were not answered, because of the mode.
    pub fn failed(&self) -> u64 {
        self.shared.lock().failed
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether somebody is there.
    fn attach(&self, stream: &TcpStream) -> bool {
        let mut state = self.lock();
        state.connection = stream.try_clone().ok().filter(|_| state.mode != Mode::Gone);
        self.changed.notify_all();
        state.connection.is_some()
    }

    /// How a request that came now is treated.
    fn mode(&self) -> Mode {
        let mut state = self.lock();
        state.failed += u64::from(state.mode == Mode::Silent);
        while state.mode == Mode::Silent {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.mode
    }

    fn fail(&self) -> u32 {
        self.lock().failed += 1;
        EIO
    }
}

fn serve(shared: &Shared, mut stream: &TcpStream, content: &mut [u8]) -> io::Result<()> {
    stream.set_nodelay(true)?;
    if !negotiate(stream, content.len() as u64)? {
        return Ok(());
    }
    let mut buffer = Vec::new();
    loop {
        let mut header = [0; 28];
        stream.read_exact(&mut header)?;
        let field =
            |from: usize, to: usize| header[from..to].iter().fold(0, |value, byte| value << 8 | u64::from(*byte));
        if field(0, 4) != u64::from(REQUEST) {
            return Err(io::Error::other("this is no request"));
        }
        let (kind, offset, len) = (field(6, 8) as u16, field(16, 24) as usize, field(24, 28) as usize);
        if kind == DISCONNECT {
            return Ok(());
        }
        buffer.resize(len.min(MOST), 0);
        if kind == WRITE {
            stream.read_exact(&mut buffer)?;
        }
        let error = match offset.checked_add(buffer.len()).and_then(|end| content.get_mut(offset..end)) {
            Some(place) if len <= MOST => carry_out(shared, kind, place, &mut buffer),
            _ => EINVAL,
        };
        stream.write_all(&[&REPLY.to_be_bytes()[..], &error.to_be_bytes(), &header[8..16]].concat())?;
        if kind == READ && error == 0 {
            stream.write_all(&buffer)?;
        }
    }
}

/// The error of the reply.
fn carry_out(shared: &Shared, kind: u16, place: &mut [u8], buffer: &mut [u8]) -> u32 {
    match (kind, shared.mode()) {
        (READ, Mode::NoReads) | (WRITE, Mode::NoWrites) => return shared.fail(),
        (WRITE, Mode::HalfWrites) => {
            let half = place.len() / 2;
            place[..half].copy_from_slice(&buffer[..half]);
            return shared.fail();
        }
        (READ, _) => buffer.copy_from_slice(place),
        (WRITE, _) => place.copy_from_slice(buffer),
        (FLUSH, _) => {}
        _ => return EINVAL,
    }
    0
}

/// Whether the client goes on to make requests.
fn negotiate(mut stream: &TcpStream, size: u64) -> io::Result<bool> {
    stream.write_all(&[&SERVER.to_be_bytes()[..], &OPTION.to_be_bytes(), &HANDSHAKE.to_be_bytes()].concat())?;
    stream.read_exact(&mut [0; 4])?;
    loop {
        let mut header = [0; 16];
        stream.read_exact(&mut header)?;
        let [.., a, b, c, d] = header;
        let len = u32::from_be_bytes([a, b, c, d]) as usize;
        if header[..8] != OPTION.to_be_bytes() || len > MOST {
            return Err(io::Error::other("this is no option"));
        }
        stream.read_exact(&mut vec![0; len])?;
        let option = u32::from_be_bytes([header[8], header[9], header[10], header[11]]);
        let reply = |kind: u32, data: &[u8]| {
            let head = [&OPTION_REPLY.to_be_bytes()[..], &option.to_be_bytes(), &kind.to_be_bytes()].concat();
            [&head[..], &(data.len() as u32).to_be_bytes(), data].concat()
        };
        match option {
            GO => {
                // NBD_INFO_EXPORT.
                let info = [&0u16.to_be_bytes()[..], &size.to_be_bytes(), &EXPORT.to_be_bytes()].concat();
                stream.write_all(&reply(INFO, &info))?;
                stream.write_all(&reply(ACK, &[]))?;
                return Ok(true);
            }
            ABORT => {
                stream.write_all(&reply(ACK, &[]))?;
                return Ok(false);
            }
            _ => stream.write_all(&reply(UNSUPPORTED, &[]))?,
        }
    }
}
