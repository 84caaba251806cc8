use crate::harness::{Running, spm_sh, state, wait_until};
use rustix::process::Signal;
use std::time::Duration;

/// Counts the signals it gets, tells on request, ends on a line `end`.
const COUNTER: &str = r#"
    usr1=0; usr2=0; term=0; int=0; cont=0; winch=0
    trap 'usr1=$((usr1+1))' USR1; trap 'usr2=$((usr2+1))' USR2; trap 'term=$((term+1))' TERM
    trap 'int=$((int+1))' INT; trap 'cont=$((cont+1))' CONT; trap 'winch=$((winch+1))' WINCH
    echo ready
    while :; do
        if read -r word; then
            [ "$word" = end ] && break
            echo "usr1=$usr1 usr2=$usr2 term=$term int=$int cont=$cont winch=$winch"
        fi
    done
"#;

struct Counter(Running);

impl Counter {
    fn start() -> Self {
        let mut running = Running::start(spm_sh(COUNTER));
        assert_eq!(running.line(), "ready");
        // The witness is started right after the command.
        std::thread::sleep(Duration::from_millis(100));
        Self(running)
    }

    /// What the command has counted once everything on its way has had time to arrive.
    fn counts(&mut self) -> String {
        use std::io::Write;
        std::thread::sleep(Duration::from_millis(150));
        self.0.child.stdin.as_mut().unwrap().write_all(b"tell\n").unwrap();
        self.0.line()
    }

    fn end(mut self) {
        use std::io::Write;
        self.0.child.stdin.as_mut().unwrap().write_all(b"end\n").unwrap();
        assert_eq!(self.0.finish().1, Some(0));
    }
}

#[test]
fn a_signal_sent_to_spm_alone_reaches_the_command_once() {
    let mut counter = Counter::start();
    for signal in [Signal::USR1, Signal::USR2, Signal::TERM, Signal::INT, Signal::CONT, Signal::WINCH] {
        counter.0.kill(signal);
    }
    assert_eq!(counter.counts(), "usr1=1 usr2=1 term=1 int=1 cont=1 winch=1");
    counter.0.kill(Signal::USR1);
    assert_eq!(counter.counts(), "usr1=2 usr2=1 term=1 int=1 cont=1 winch=1");
    counter.end();
}

#[test]
fn a_signal_sent_to_the_group_reaches_the_command_once() {
    let mut counter = Counter::start();
    for signal in [Signal::USR1, Signal::USR2, Signal::TERM, Signal::INT, Signal::CONT, Signal::WINCH] {
        counter.0.kill_group(signal);
    }
    assert_eq!(counter.counts(), "usr1=1 usr2=1 term=1 int=1 cont=1 winch=1");
    counter.0.kill_group(Signal::USR1);
    counter.0.kill(Signal::USR2);
    assert_eq!(counter.counts(), "usr1=2 usr2=2 term=1 int=1 cont=1 winch=1");
    counter.end();
}

#[test]
fn a_command_that_the_signal_ends_ends_spm_with_its_status() {
    for (signal, status) in [(Signal::TERM, 143), (Signal::HUP, 129), (Signal::INT, 130), (Signal::USR1, 138)] {
        let mut running = Running::start(spm_sh("echo ready; exec sleep 60"));
        running.line();
        running.kill(signal);
        assert_eq!(running.finish().1, Some(status));
        let mut running = Running::start(spm_sh("echo ready; exec sleep 60"));
        running.line();
        running.kill_group(signal);
        assert_eq!(running.finish().1, Some(status));
    }
}

#[test]
fn spm_stops_when_its_command_stops_and_both_continue() {
    let mut running = Running::start(spm_sh("echo $$; kill -STOP $$; echo continued; read -r line; exit 4"));
    let command = running.line();
    assert_eq!(running.wait_stopped(), Some(19));
    assert_eq!(state(&command), Some('T'));
    running.kill_group(Signal::CONT);
    assert_eq!(running.line(), "continued");
    assert_eq!(running.finish().1, Some(4));
}

#[test]
fn continuing_spm_alone_continues_the_command() {
    let running = Running::start(spm_sh("kill -STOP $$; echo continued"));
    running.wait_stopped();
    running.kill(Signal::CONT);
    assert_eq!(running.finish(), ("continued\n".to_owned(), Some(0)));
}

#[test]
fn continuing_or_ending_the_command_alone_wakes_spm() {
    for (signal, status) in [("CONT", 4), ("KILL", 137)] {
        let mut running = Running::start(spm_sh("echo $$; kill -STOP $$; exit 4"));
        let command = running.line();
        running.wait_stopped();
        std::process::Command::new("sh").args(["-c", &format!("kill -{signal} {command}")]).status().unwrap();
        assert_eq!(running.finish().1, Some(status));
    }
}

#[test]
fn killing_spm_leaves_the_command_running_and_nothing_else() {
    let mut running = Running::start(spm_sh("echo $$; read -r line; echo \"got $line\""));
    let command = running.line();
    let mut stdin = running.child.stdin.take().unwrap();
    running.kill(Signal::KILL);
    let pid = running.child.id();
    running.child.wait().unwrap();
    assert_ne!(state(&command), None);
    wait_until("the witness goes with spm", || group(pid) == [command.parse::<u32>().unwrap()]);
    use std::io::Write;
    stdin.write_all(b"on\n").unwrap();
    assert_eq!(running.line(), "got on");
}

#[test]
fn an_ended_command_leaves_no_process_behind() {
    let running = Running::start(spm_sh("exit 0"));
    let pid = running.child.id();
    assert_eq!(running.finish().1, Some(0));
    assert_eq!(group(pid), [0_u32; 0]);
}

#[test]
fn descendants_that_outlive_the_command_are_left_alone() {
    let mut running = Running::start(spm_sh("sleep 60 >/dev/null 2>&1 & echo $!"));
    let descendant = running.line();
    assert_eq!(running.finish().1, Some(0));
    assert!(matches!(state(&descendant), Some('S' | 'R')));
    std::process::Command::new("kill").arg(&descendant).status().unwrap();
}

/// The processes of group `id`, but for those that wait for somebody else to reap them.
fn group(id: u32) -> Vec<u32> {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let Some((_, rest)) = stat.rsplit_once(") ") else { return false };
        let mut fields = rest.split(' ');
        fields.next() != Some("Z") && fields.nth(1) == Some(&id.to_string())
    })
    .collect()
}
