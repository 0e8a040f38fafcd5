//! The `CONNECT` handshake, both sides: what a VMM (and so a guest) answers us, and what a process asks where we serve.
//!
//! Compiled into the fuzz target and into the test that replays its corpus.

use clawpot_host::connect;

pub fn run(data: &[u8]) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime without drivers");
    runtime.block_on(async {
        let mut answer = data;
        let asked = connect::connect(&mut tokio::io::join(&mut answer, tokio::io::sink()), 10051).await;
        assert_eq!(asked.is_ok(), number(data, b"OK ").is_some(), "{:?}", String::from_utf8_lossy(data));
        read_to_the_newline(data, answer, asked.is_ok());

        let mut request = data;
        let port = connect::accept(&mut request).await;
        assert_eq!(port.as_ref().ok().copied(), number(data, b"CONNECT "), "{:?}", String::from_utf8_lossy(data));
        read_to_the_newline(data, request, port.is_ok());
        if let Err(error) = port {
            assert!(error.to_string().len() < 1000, "an error that grows with what was sent: {error}");
        }
    });
}

/// The same rule said in another way: one line of at most 32 bytes, the word, decimal digits, below 2^32.
fn number(data: &[u8], word: &[u8]) -> Option<u32> {
    let end = data.iter().position(|byte| *byte == b'\n').filter(|end| *end <= 32)?;
    let digits = data[..end].strip_prefix(word).filter(|digits| !digits.is_empty())?;
    digits.iter().try_fold(0_u32, |sum, digit| {
        let digit = char::from(*digit).to_digit(10)?;
        sum.checked_mul(10)?.checked_add(digit)
    })
}

/// What follows the line belongs to the protocol behind it; and never is much more read than a line may hold.
fn read_to_the_newline(data: &[u8], rest: &[u8], was_ok: bool) {
    let read = data.len() - rest.len();
    assert!(read <= 33, "{read} bytes read");
    if was_ok {
        assert_eq!(data[read - 1], b'\n');
    }
}
