//! Where a console is taken up again after the server was away. A console has no offsets: its beginning is dropped as it
//! grows. So the last bytes shown are looked for in what the server still keeps.

use crate::output::note;

/// Bytes by which the place is recognised. Kernel lines carry times, so a kibibyte of them occurs once.
const MARK: usize = 1 << 10;
/// Silence of a stream after which the search is given up: the server first sends all that it keeps without a pause.
pub const SILENCE: std::time::Duration = std::time::Duration::from_secs(1);

#[derive(Debug, Default)]
pub struct Seam {
    /// The last bytes shown, at most [`MARK`].
    mark: Vec<u8>,
    /// While searching: the end of what has been searched, shorter than the mark.
    search: Option<Vec<u8>>,
    advanced: bool,
}

impl Seam {
    /// Another stream begins: skip what was shown.
    pub fn begin(&mut self) {
        self.search = (!self.mark.is_empty()).then(Vec::new);
    }

    pub fn is_searching(&self) -> bool {
        self.search.is_some()
    }

    /// The mark is not there any more: go on with what comes.
    pub fn give_up(&mut self) {
        self.search = None;
        note("the console was renewed meanwhile: some of it may be missing here");
    }

    /// Whether anything was shown since the last time this was asked.
    pub fn advanced(&mut self) -> bool {
        std::mem::take(&mut self.advanced)
    }

    /// What of `data` has not been shown yet.
    pub fn fresh(&mut self, data: &[u8]) -> Vec<u8> {
        let fresh = match self.search.take() {
            None => data.to_vec(),
            Some(mut tail) => {
                tail.extend_from_slice(data);
                match position(&tail, &self.mark) {
                    Some(at) => tail.split_off(at + self.mark.len()),
                    None => {
                        let keep = tail.len().min(self.mark.len() - 1);
                        tail.drain(..tail.len() - keep);
                        self.search = Some(tail);
                        Vec::new()
                    }
                }
            }
        };
        self.remember(&fresh);
        fresh
    }

    fn remember(&mut self, shown: &[u8]) {
        self.advanced |= !shown.is_empty();
        self.mark.extend_from_slice(&shown[shown.len().saturating_sub(MARK)..]);
        self.mark.drain(..self.mark.len().saturating_sub(MARK));
    }
}

fn position(text: &[u8], mark: &[u8]) -> Option<usize> {
    text.windows(mark.len()).position(|window| window == mark)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_shown_is_not_shown_again() {
        let whole: Vec<u8> = (0..5_000u32).flat_map(|n| format!("[{n:9}] line\n").into_bytes()).collect();
        for chunk in [7, 999, 4_096] {
            for seen in [0, 5, 1_024, 50_000] {
                let mut seam = Seam::default();
                let mut shown = seam.fresh(&whole[..seen]);
                seam.begin();
                // The beginning may have been dropped meanwhile, as far as it was not the mark.
                for piece in whole[seen.saturating_sub(2_000)..].chunks(chunk) {
                    shown.extend(seam.fresh(piece));
                }
                assert!(shown == whole, "chunk {chunk}, seen {seen}");
            }
        }
    }
}
