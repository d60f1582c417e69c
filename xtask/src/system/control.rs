//! The control channel from a test's side: requests and responses as lines of JSON, one at a time.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// The hypervisor answers from an interrupt: minutes mean that it is gone.
const ANSWER: Duration = Duration::from_secs(180);

/// A connection. QEMU accepts one at a time.
pub struct Control {
    lines: BufReader<UnixStream>,
    next: u64,
}

impl Control {
    /// Connects to QEMU's socket.
    ///
    /// # Errors
    /// When nobody listens.
    pub fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).with_context(|| format!("cannot connect to {}", socket.display()))?;
        stream.set_read_timeout(Some(ANSWER)).context("cannot set a time limit")?;
        Ok(Self { lines: BufReader::new(stream), next: 1 })
    }

    /// Sends a request, an object such as `{"op": "stats", "vm": "a"}`, and returns what its response holds in `ok`.
    /// Events that arrive meanwhile are passed over.
    ///
    /// # Errors
    /// When the hypervisor refuses it or does not answer.
    pub fn ask(&mut self, mut request: Value) -> Result<Value> {
        let id = self.next;
        self.next += 1;
        request["id"] = id.into();
        let line = format!("{request}\n");
        self.lines.get_mut().write_all(line.as_bytes()).context("cannot send a request")?;
        loop {
            let mut line = String::new();
            let count = self.lines.read_line(&mut line).with_context(|| format!("no answer to {request}"))?;
            ensure!(count > 0, "the control channel closed before it answered {request}");
            let mut answer: Value = serde_json::from_str(&line).with_context(|| format!("not JSON: {line:?}"))?;
            if answer["id"] == id {
                if !answer["error"].is_null() {
                    bail!("{request} was refused: {}", answer["error"]);
                }
                return Ok(answer["ok"].take());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use serde_json::json;

    use super::*;

    #[test]
    fn answers_are_matched_by_number_and_refusals_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let server = thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut lines = BufReader::new(stream);
            let mut line = String::new();
            lines.read_line(&mut line).unwrap();
            assert_eq!(serde_json::from_str::<Value>(&line).unwrap(), json!({"id": 1, "op": "ps"}));
            lines.get_mut().write_all(b"{\"event\":{}}\n{\"id\":1,\"ok\":[7]}\n").unwrap();
            lines.read_line(&mut line).unwrap();
            lines.get_mut().write_all(b"{\"id\":2,\"error\":{\"code\":\"no-such-vm\"}}\n").unwrap();
        });
        let mut control = Control::connect(&path).unwrap();
        assert_eq!(control.ask(json!({"op": "ps"})).unwrap(), json!([7]));
        assert!(control.ask(json!({"op": "kill", "vm": "x"})).unwrap_err().to_string().contains("no-such-vm"));
        server.join().unwrap();
        assert!(control.ask(json!({"op": "ps"})).is_err());
    }
}
