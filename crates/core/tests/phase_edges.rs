//! The drawing at the top of `phase.rs` and `Phase::may_become` say the same.

use std::collections::{BTreeMap, BTreeSet};

use clawpot_core::Phase;

type Edges = BTreeSet<(String, String)>;

fn name(phase: Phase) -> String {
    format!("{phase:?}")
}

fn table() -> Edges {
    let pairs = Phase::ALL.into_iter().flat_map(|from| Phase::ALL.map(|to| (from, to)));
    pairs.filter(|(from, to)| from.may_become(*to)).map(|(from, to)| (name(from), name(to))).collect()
}

/// The characters of the drawing, and where its words are.
struct Drawing {
    grid: Vec<Vec<char>>,
    /// Row, columns, word.
    words: Vec<(usize, std::ops::Range<usize>, String)>,
}

/// Rows down, columns right.
type Way = (isize, isize);

const LEFT: Way = (0, -1);
const RIGHT: Way = (0, 1);
const UP: Way = (-1, 0);
const DOWN: Way = (1, 0);

/// Where a glyph's line goes on to; for an arrowhead also where it points.
fn arms(glyph: char) -> (&'static [Way], Option<Way>) {
    match glyph {
        '─' => (&[LEFT, RIGHT], None),
        '│' => (&[UP, DOWN], None),
        '┌' => (&[RIGHT, DOWN], None),
        '┐' => (&[LEFT, DOWN], None),
        '└' => (&[RIGHT, UP], None),
        '┘' => (&[LEFT, UP], None),
        '├' => (&[UP, DOWN, RIGHT], None),
        '┤' => (&[UP, DOWN, LEFT], None),
        '┬' => (&[LEFT, RIGHT, DOWN], None),
        '┴' => (&[LEFT, RIGHT, UP], None),
        '┼' => (&[LEFT, RIGHT, UP, DOWN], None),
        '►' => (&[LEFT], Some(RIGHT)),
        '◄' => (&[RIGHT], Some(LEFT)),
        '▼' => (&[UP], Some(DOWN)),
        '▲' => (&[DOWN], Some(UP)),
        _ => (&[], None),
    }
}

impl Drawing {
    fn of(source: &str) -> Self {
        let lines = source.lines().skip_while(|line| *line != "//! ```text").skip(1);
        let lines = lines.take_while(|line| *line != "//! ```");
        let grid: Vec<Vec<char>> = lines.map(|line| line.chars().skip("//! ".len()).collect()).collect();
        let mut words = Vec::new();
        for (row, line) in grid.iter().enumerate() {
            let mut column = 0;
            while column < line.len() {
                let length = line[column..].iter().take_while(|c| c.is_alphanumeric() || "()".contains(**c)).count();
                if length > 0 {
                    words.push((row, column..column + length, line[column..column + length].iter().collect()));
                }
                column += length.max(1);
            }
        }
        Self { grid, words }
    }

    fn glyph(&self, (row, column): (usize, usize)) -> char {
        self.grid.get(row).and_then(|line| line.get(column)).copied().unwrap_or(' ')
    }

    fn step(at: (usize, usize), by: Way) -> Option<(usize, usize)> {
        Some((at.0.checked_add_signed(by.0)?, at.1.checked_add_signed(by.1)?))
    }

    /// The word that is at `at`, or one blank further to the side.
    fn word(&self, at: (usize, usize), by: Way) -> Option<&str> {
        let next = Self::step(at, by)?;
        let here = |(row, column): (usize, usize)| {
            let found = self.words.iter().find(|(line, columns, _)| *line == row && columns.contains(&column));
            found.map(|(_, _, word)| word.as_str())
        };
        here(next).or_else(|| if by.0 == 0 && self.glyph(next) == ' ' { here(Self::step(next, by)?) } else { None })
    }

    /// Each connected line leads from every word it leaves to every word it points at.
    fn edges(&self) -> Edges {
        let mut edges = Edges::new();
        let mut seen = BTreeSet::new();
        for row in 0..self.grid.len() {
            for column in 0..self.grid[row].len() {
                if self.glyph((row, column)) == '⇄' {
                    let left = self.word((row, column), LEFT).expect("a word left of ⇄").to_owned();
                    let right = self.word((row, column), RIGHT).expect("a word right of ⇄").to_owned();
                    edges.insert((left.clone(), right.clone()));
                    edges.insert((right, left));
                } else if !arms(self.glyph((row, column))).0.is_empty() && !seen.contains(&(row, column)) {
                    let (from, to) = self.trace((row, column), &mut seen);
                    assert!(
                        !from.is_empty() && !to.is_empty(),
                        "a line at {row}:{column} leads from {from:?} to {to:?}"
                    );
                    edges.extend(from.iter().flat_map(|from| to.iter().map(|to| (from.clone(), to.clone()))));
                }
            }
        }
        edges
    }

    fn trace(&self, start: (usize, usize), seen: &mut BTreeSet<(usize, usize)>) -> (Vec<String>, Vec<String>) {
        let (mut from, mut to, mut todo) = (Vec::new(), Vec::new(), vec![start]);
        while let Some(at) = todo.pop() {
            if !seen.insert(at) {
                continue;
            }
            let (lines, points) = arms(self.glyph(at));
            if let Some(by) = points {
                to.extend(self.word(at, by).map(str::to_owned));
            }
            for by in lines {
                let next = Self::step(at, *by).expect("a line that leaves the drawing");
                let back = (-by.0, -by.1);
                if arms(self.glyph(next)).0.contains(&back) {
                    todo.push(next);
                } else {
                    from.extend(self.word(at, *by).map(str::to_owned));
                }
            }
        }
        (from, to)
    }

    /// `X: as Y` in words: X has the edges of Y.
    fn likes(&self) -> BTreeMap<String, String> {
        let words: Vec<&str> = self.words.iter().map(|(_, _, word)| word.as_str()).collect();
        let likes = words.windows(3).filter(|three| three[1] == "as");
        likes.map(|three| (three[0].to_owned(), three[2].to_owned())).collect()
    }
}

fn drawn() -> Edges {
    let drawing = Drawing::of(include_str!("../src/phase.rs"));
    let mut edges = drawing.edges();
    edges.retain(|(_, to)| to != "(gone)");
    for (new, old) in drawing.likes() {
        let renamed = |word: &String| if *word == old { new.clone() } else { word.clone() };
        let copied: Edges = edges.iter().map(|(from, to)| (renamed(from), renamed(to))).collect();
        edges.extend(copied);
    }
    let every: Vec<(String, String)> = edges.iter().filter(|(from, _)| from == "any").cloned().collect();
    for (any, to) in every {
        edges.remove(&(any, to.clone()));
        let sources = Phase::ALL.into_iter().map(name).filter(|from| *from != to && from != "Quarantined");
        edges.extend(sources.map(|from| (from, to.clone())));
    }
    let every: Vec<(String, String)> = edges.iter().filter(|(_, to)| to == "any").cloned().collect();
    for (from, any) in every {
        edges.remove(&(from.clone(), any));
        let goals = Phase::ALL.into_iter().map(name).filter(|to| *to != from);
        edges.extend(goals.map(|to| (from.clone(), to)));
    }
    edges
}

fn lines(edges: &Edges) -> String {
    edges.iter().map(|(from, to)| format!("  {from} ─► {to}\n")).collect()
}

#[test]
fn the_drawing_and_the_table_agree() {
    let (drawn, table) = (drawn(), table());
    let only_drawn: Edges = drawn.difference(&table).cloned().collect();
    let only_in_table: Edges = table.difference(&drawn).cloned().collect();
    assert!(
        only_drawn.is_empty() && only_in_table.is_empty(),
        "drawn in phase.rs, but not in may_become:\n{}in may_become, but not drawn:\n{}",
        lines(&only_drawn),
        lines(&only_in_table)
    );
}

#[test]
fn the_edges_are_these() {
    insta::assert_snapshot!(lines(&table()));
}

/// The reader of drawings itself.
#[test]
fn a_drawing_is_read() {
    let drawing = Drawing::of("//! ```text\n//!  ┌────┬─► D\n//!  A ─► B\n//!  │    ▲\n//!  └► C─┘  E ⇄ A\n//! ```\n");
    let edges: Vec<String> = drawing.edges().iter().map(|(from, to)| format!("{from}{to}")).collect();
    assert_eq!(edges, ["AB", "AC", "AD", "AE", "BD", "CB", "EA"]);
}
