//! Chance from a seed. Two with the same seed draw the same.

use clawpot_testkit::time::mix;

#[derive(Clone, Debug)]
pub struct Chance(u64);

impl Chance {
    /// `stream` makes several of one seed that know nothing of each other.
    #[must_use]
    pub fn new(seed: u64, stream: u64) -> Self {
        Self(mix(seed).wrapping_add(mix(stream.wrapping_mul(0x5851_f42d_4c95_7f2d))))
    }

    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(1);
        mix(self.0)
    }

    /// `0..count`; 0 of nothing.
    pub fn below(&mut self, count: u64) -> u64 {
        // The bias is below 2⁻⁴⁰ for the small counts drawn here.
        self.draw() % count.max(1)
    }

    /// `from..=to`.
    pub fn between(&mut self, from: u64, to: u64) -> u64 {
        from + self.below(to - from + 1)
    }

    pub fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }

    pub fn pick<'a, T>(&mut self, things: &'a [T]) -> Option<&'a T> {
        let at = self.below(u64::try_from(things.len()).unwrap_or(1));
        things.get(usize::try_from(at).unwrap_or(0))
    }

    /// The index of one of `weights`, each as likely as it is heavy.
    pub fn weighted(&mut self, weights: &[u64]) -> usize {
        let mut left = self.below(weights.iter().sum());
        for (index, weight) in weights.iter().enumerate() {
            if left < *weight {
                return index;
            }
            left -= weight;
        }
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_draws_the_same_and_streams_differ() {
        let draws = |mut chance: Chance| (0..8).map(|_| chance.draw()).collect::<Vec<_>>();
        assert_eq!(draws(Chance::new(7, 1)), draws(Chance::new(7, 1)));
        assert_ne!(draws(Chance::new(7, 1)), draws(Chance::new(7, 2)));
        assert_ne!(draws(Chance::new(7, 1)), draws(Chance::new(8, 1)));
    }

    #[test]
    fn weights_are_kept() {
        let mut chance = Chance::new(1, 1);
        let mut drawn = [0u32; 3];
        for _ in 0..10_000 {
            drawn[chance.weighted(&[1, 0, 9])] += 1;
        }
        assert!(drawn[0] > 700 && drawn[0] < 1300 && drawn[1] == 0, "{drawn:?}");
    }
}
