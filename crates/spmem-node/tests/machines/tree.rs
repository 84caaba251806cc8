//! A captured machine as a tree of files again: the text form is that of `capture.sh`.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Component, Path};

/// A directory that goes away with this.
pub struct Tree(tempfile::TempDir);

impl Tree {
    /// Unpacks `text`.
    pub fn new(text: &str) -> Self {
        let tree = Self(tempfile::tempdir().unwrap());
        let mut file: Option<(String, String)> = None;
        for line in text.lines().filter(|line| !line.starts_with('#')).chain(["= end"]) {
            let (kind, rest) = line.split_at(line.len().min(1));
            if kind == " " {
                let (_, text) = file.as_mut().unwrap();
                text.push_str(rest);
                text.push('\n');
                continue;
            }
            if let Some((path, text)) = file.take() {
                tree.write(&path, text.as_bytes());
            }
            match (kind, rest.trim()) {
                ("=", path) => file = Some((path.to_owned(), String::new())),
                (">", both) => {
                    let (path, target) = both.split_once(' ').unwrap();
                    let place = tree.place(path);
                    symlink(target, place).unwrap();
                }
                ("/", path) => fs::create_dir_all(tree.place(path)).unwrap(),
                other => panic!("a line of a captured machine cannot be {other:?}"),
            }
        }
        tree
    }

    /// Where `sys` and `proc` are.
    pub fn root(&self) -> &Path {
        self.0.path()
    }

    /// Replaces a file, or makes it.
    pub fn write(&self, path: &str, bytes: &[u8]) {
        fs::write(self.place(path), bytes).unwrap();
    }

    fn place(&self, path: &str) -> std::path::PathBuf {
        let path = Path::new(path);
        assert!(path.components().all(|part| matches!(part, Component::Normal(_))), "{}", path.display());
        let place = self.root().join(path);
        fs::create_dir_all(place.parent().unwrap()).unwrap();
        place
    }
}
