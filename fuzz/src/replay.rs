//! Runs a target on its whole corpus: what the fuzzer once found worth keeping is an ordinary test from then on.

use std::path::Path;

pub fn replay(target: &str, run: fn(&[u8])) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().map(|above| above.join("fuzz/corpus").join(target));
    let corpus = corpus.into_iter().find(|directory| directory.is_dir()).expect("fuzz/corpus is in the tree");
    let mut count = 0;
    for file in std::fs::read_dir(corpus).expect("a directory") {
        let path = file.expect("an entry").path();
        println!("{}", path.display());
        run(&std::fs::read(path).expect("a file"));
        count += 1;
    }
    assert!(count >= 5, "the corpus of {target} has {count} inputs");
}
